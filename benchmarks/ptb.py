"""A small language model on Penn Treebank: the paper's three methods, the runner's defaults and the start kept, in equal time.

    python -m benchmarks.ptb --text ptb.train.txt ptb.valid.txt ptb.test.txt [--seeds 2] [--minutes 10] [--methods ...]

Each cell is `python examples/language_model.py --small` for so many minutes on one thread, and goes on where it stopped. Writes
benchmarks/results/ptb-small.json; `python -m benchmarks.tables` makes the table and the plot of docs/guides/sequences.md of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.overhead import RESULTS

ROOT = Path(__file__).resolve().parent.parent
FILE = RESULTS / "ptb-small.json"
METHODS = {
    "untuned": "the start kept",
    "stn": "STN",
    "centered": "centred STN",
    "delta": "Δ-STN, the paper's settings",
    "default": "Δ-STN, the runner's defaults",
}


def cell(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one run, in a process of its own."""
    out = args.out / f"{method}-{seed}"
    options = ["--epochs", 999, "--minutes", args.minutes, "--method", method, "--seed", seed, "--out", out]
    example = ROOT / "examples" / "language_model.py"
    command = [sys.executable, *map(str, (example, *args.text, "--small", *options))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over seeds and each seed's, by method."""
    rows = []
    for method, label in METHODS.items():
        runs = [run for run in results.values() if run["method"] == method]
        if runs:
            columns = [[run[key] for run in runs] for key in ("valid_perplexity", "test_perplexity", "epochs")]
            shown = [f"{statistics.mean(c):.1f} ({', '.join(f'{v:.1f}' for v in c)})" for c in columns[:2]]
            rows.append([label, *shown, f"{statistics.mean(columns[2]):.0f}"])
    return tabulate(
        rows, ["method", "validation perplexity", "test perplexity", "epochs"], tablefmt="github", disable_numparse=True
    )


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Best validation perplexity so far over time, and the schedules that the defaults found."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained")
    colours = dict(zip(METHODS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for run in results.values():
        minutes = [seconds / 60 for seconds in itertools.accumulate(row["seconds"] for row in run["history"])]
        best = list(itertools.accumulate((row["perplexity"] for row in run["history"]), min))
        label = METHODS[run["method"]] if run["seed"] == 0 else None
        left.plot(minutes, best, color=colours[run["method"]], label=label)
    left.set(xlabel="minutes on one thread", ylabel="best validation perplexity so far", yscale="log")
    left.set_yticks(ticks := [150, 200, 300, 400, 600], map(str, ticks))
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    run = results["default 0"]
    for name in run["found"]:
        values = [row[name] for row in run["history"]]
        right.plot(range(1, len(values) + 1), values, label=name, linestyle="--" if name.endswith("decay") else "-")
    right.set(xlabel="epoch", title="found by the defaults (seed 0)", yscale="log")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs=3, type=Path, required=True, help="training, validation and test file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("out/ptb"), help="checkpoints")
    args = parser.parse_args()
    for seed, method in tqdm([(s, m) for s in range(args.seeds) for m in args.methods], disable=None):
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        if (key := f"{method} {seed}") not in results:
            result = cell(method, seed, args) | {"minutes": args.minutes}
            results = json.loads(FILE.read_text()) if FILE.exists() else {}  # another process may have written
            FILE.write_text(json.dumps(results | {key: result}, separators=(",", ":")) + "\n")
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
