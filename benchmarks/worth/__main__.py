"""Run what is missing of the table, and write docs/results/worth.md with `make figures`.

    python -m benchmarks.worth [--task T ...] [--column C ...] [--seed S ...] [--reading R ...] [--minutes M] [--report]

It goes on where it stopped: benchmarks/results/worth/TASK.json has a cell for each column, start and seed. Two processes may
work on different tasks. Times are of the CPU with one thread. AdamCPR needs `pip install pytorch-cpr`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.worth import cells, report
from benchmarks.worth.columns import COLUMNS, CellIsMissing, missing, run
from benchmarks.worth.tasks import STARTS, TASKS


def fill(todo: Sequence[tuple[str, str, str, str, int]], minutes: float = float("inf")) -> list[str]:
    """Run columns one after the other, and no further one after so many minutes. Returns what went wrong, a line each."""
    end, failures = time.time() + 60 * minutes, []
    for cell in (bar := tqdm(todo, disable=None)):
        if time.time() > end:
            break
        name = " ".join(map(str, cell))
        bar.set_description(name)
        try:
            run(*cell)
        except (CellIsMissing, RuntimeError) as error:
            failures.append(f"{name}: {error}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), help="which tasks")
    parser.add_argument("--column", nargs="+", default=list(COLUMNS), choices=list(COLUMNS), help="which columns")
    parser.add_argument("--reading", nargs="+", default=list(cells.READINGS), choices=list(cells.READINGS),
                        help="equal time, or each column until its validation loss stops falling")  # fmt: skip
    parser.add_argument("--start", nargs="+", default=list(STARTS), choices=list(STARTS), help="of runs that have one")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2], help="which seeds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further cell is begun")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and run nothing")
    args = parser.parse_args()
    todo = [] if args.report else [
        (task, reading, column, start, seed)
        for seed in args.seed for reading in args.reading for column in COLUMNS if column in args.column
        for task in args.task for start in args.start
        if missing(task, reading, column, start, seed, cells.read(task))
    ]  # fmt: skip
    torch.set_num_threads(1)
    failures = fill(todo, args.minutes)
    print(report.text(), *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
