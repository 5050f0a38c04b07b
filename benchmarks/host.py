"""What a step costs the host: Python, and torch until a kernel runs.

    python -m benchmarks.host        # a minute on one core

Networks are so narrow, and batches so small, that kernels take next to no time, on a CPU and without a GPU. Kinds of steps
alternate, on one thread; times are medians. On a GPU in eager mode a step of a small network takes as long as the host does.
Results: benchmarks/results/host.json.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.kernels import PULL_BACK, Case
from benchmarks.on_device import Measured, ratio
from benchmarks.overhead import RESULTS
from fxstn.tools.bench import LONG, SHORT, environment

PATH = RESULTS / "host.json"
NETWORKS = ("narrow_mlp", "narrow_cnn", "narrow_vit")
ROUNDS = 60


def table(results: dict[str, Any]) -> str:
    """Ratios to a step of plain training, as Markdown."""
    rows = []
    for name, times in results["times"].items():
        plain = times["plain"]["ms"]
        own = times[PULL_BACK]["ms"] - times["inner"]["ms"]
        kinds = (times["inner"]["ms"], own, times["response"]["ms"], times["hyper"]["ms"])
        shares = [f"{ms / plain:.2f}" for ms in kinds]
        rows.append([name, f"{plain:.2f}", *shares, *(f"{ratio(times, inner):.2f}" for inner in (SHORT, LONG))])
    headers = ["network", "plain, ms", "inner", "Θᵀg", "response", "hyper", "default, 1,000 steps", "10,000 steps"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    torch.set_num_threads(1)
    results = environment("cpu") | {"times": {}}
    for name in NETWORKS:
        measured = Measured(Case(f"benchmarks.networks:{name}", 4, 8), "cpu", False, False, False)
        measured.times(10)
        results["times"][name] = measured.times(ROUNDS)
    PATH.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
