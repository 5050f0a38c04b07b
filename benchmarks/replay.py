"""Does a schedule do without the run that found it? Fresh networks trained on a found schedule, and on its last values.

    python -m benchmarks.replay [--tasks mnist-mlp concrete-mlp] [--starts low high] [--seeds 3] [--data-root DIR]

For each task, start and seed of benchmarks/tuning.py: "tuned", the run that finds the schedule, with the defaults; then
three runs from other weights that take no step of Θ or λ: "schedule", λ moving as it did; "last values", λ where it ended, from
the first epoch on; "start", λ where it began. Writes benchmarks/results/replay.json as it goes and goes on where it stopped;
`python -m benchmarks.tables` makes the table of docs/results/tuning.md of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxstn
from benchmarks.overhead import RESULTS
from benchmarks.trials import outcome, prepared
from benchmarks.tuned import STARTS, seconds_of
from benchmarks.tuning import TASKS

FILE = RESULTS / "replay.json"
REPLAYS = ("schedule", "last values", "start")


def cell(task: str, start: str, seed: int, root: str | None) -> dict[str, Any]:
    """{kind of run: its outcome (benchmarks.tuning)}."""
    torch.manual_seed(seed)
    tuned, test_set = prepared(TASKS[task], "default", STARTS[start], seed, root)
    found = tuned.fit(TASKS[task].epochs).schedule()
    results = {"tuned": outcome(TASKS[task], tuned, test_set, diverged=False)}
    still = fxstn.Schedule({name: values[:1] for name, values in found.values.items()})
    for kind, schedule in zip(REPLAYS, (found, found.final(), still), strict=True):
        torch.manual_seed(100 + seed)
        runner, _ = prepared(TASKS[task], "default", STARTS[start], seed, root, schedule=schedule)
        runner.fit(TASKS[task].epochs)
        results[kind] = outcome(TASKS[task], runner, test_set, diverged=False)
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Validation losses, means ± standard deviations over seeds, and the time of a replay as a share of the tuned run's."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, found in results.items():
        task, start, _ = key.split()
        groups.setdefault((task, start), []).append(found)
    rows = []
    for (task, start), cells in groups.items():
        losses = [[cell[kind]["valid"] for cell in cells] for kind in ("tuned", *REPLAYS)]
        shown = [
            f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
            for values in losses
        ]
        time = statistics.median(seconds_of(cell["schedule"]) / seconds_of(cell["tuned"]) for cell in cells)
        rows.append([task, start, *shown, f"{time:.2f}", len(cells)])
    headers = ["task", "start", "tuned", "its schedule replayed", "its last values kept", "the start kept",
               "time of a replay / tuned", "seeds"]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["mnist-mlp", "concrete-mlp"], choices=list(TASKS))
    parser.add_argument("--starts", nargs="+", default=["low", "high"], choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--data-root", default=os.environ.get("FXSTN_DATA"), help="default: the variable FXSTN_DATA")
    args = parser.parse_args()
    todo = [(seed, task, start) for seed in range(args.seeds) for task in args.tasks for start in args.starts]
    for seed, task, start in tqdm(todo, disable=None):
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        if (key := f"{task} {start} {seed}") not in results:
            results[key] = cell(task, start, seed, args.data_root)
            FILE.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
