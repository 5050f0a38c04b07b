"""The report of benchmarks/tuning.py, from its JSON files alone: tables, and docs/tuning.png."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
STARTS = {"low": 0.05, "middle": 0.3, "high": 0.7}  # of dropout; as shares of the range in log space for weight decay
SEARCHES = ("random", "random-halving", "tpe", "tpe-halving")
Cell = dict[str, Any]


def path_of(task: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"tuning-{task}.json"


def seconds_of(cell: Cell) -> float:
    return cell["curve"][-1][0] if cell["curve"] else 0.0


def best_within(trials: Sequence[Cell], seconds: float) -> Cell:
    """The best of the trials that a search starts within a time; the first in any case. All are run to their end."""
    starts = itertools.accumulate(map(seconds_of, trials), initial=0.0)
    begun = [trial for trial, start in zip(trials, starts, strict=False) if start < seconds]
    return min(begun or trials[:1], key=lambda trial: trial["valid"])


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def cells_of(results: dict[str, Any], method: str, start: str) -> list[Any]:
    """One for each seed: a cell, or the trials of a search (start "any")."""
    return [cell for key, cell in results.items() if key.startswith(f"{method} {start} ")]


def default_seconds(results: dict[str, Any]) -> float:
    """Mean time of a run with the default settings; of any run where there is none."""
    runs = [cell for key, cell in results.items() if isinstance(cell, dict)]
    defaults = [cell for start in STARTS for cell in cells_of(results, "default", start)]
    return statistics.mean(map(seconds_of, defaults or runs))


def table(results: dict[str, Any]) -> str:
    """A line for each method and start: means ± standard deviations over seeds; searches at "default"'s time and in all."""
    rows = []

    def line(label: str, start: str, cells: Sequence[Cell], seconds: float) -> None:
        losses = [_mean([cell[part] for cell in cells]) for part in ("valid", "test")]
        rows.append([label, start, *losses, f"{seconds:.0f}", len(cells)])

    for method in dict.fromkeys(key.split()[0] for key in results):
        for start in STARTS:
            if cells := cells_of(results, method, start):
                line(method, start, cells, statistics.mean(map(seconds_of, cells)))
    time = default_seconds(results)
    for method in SEARCHES:
        if searches := cells_of(results, method, "any"):
            line(f"{method}, same time", "", [best_within(trials, time) for trials in searches], time)
            total = statistics.mean(sum(map(seconds_of, trials)) for trials in searches)
            count = min(map(len, searches))
            line(f"{method}, {count} trials", "", [best_within(trials, float("inf")) for trials in searches], total)
    headers = ["method", "start", "best validation loss", "test loss there", "seconds", "seeds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def gap_closed(results: dict[str, Any]) -> str:
    """How much of the way from "untuned" to the best of all trials of random search "default" goes, from each start."""
    searches = cells_of(results, "random", "any")
    parts = []
    for start in STARTS:
        ours, plain = (cells_of(results, method, start) for method in ("default", "untuned"))
        if ours and plain and searches:
            best = statistics.mean(best_within(trials, float("inf"))["valid"] for trials in searches)
            from_, to = (statistics.mean(cell["valid"] for cell in cells) for cells in (plain, ours))
            parts.append(f"{start} {100 * (from_ - to) / (from_ - best):.0f} % of {from_ - best:.4f}")
    return "Gap between untuned and the best of random search that the default settings close: " + ", ".join(parts)


def best_so_far(trials: Sequence[Cell], times: Sequence[float]) -> list[float]:
    """Least validation loss known at each time, over trials made one after the other; NaN before the first epoch."""
    begun = itertools.accumulate(map(seconds_of, trials), initial=0.0)
    points = [(start + t, loss) for trial, start in zip(trials, begun, strict=False) for t, loss in trial["curve"]]
    return [min((loss for t, loss in points if t <= time), default=float("nan")) for time in times]


def plot(tasks: Sequence[str], path: Path) -> None:
    """Best validation loss against time, mean over seeds, a panel for each task."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    colors = {"untuned": "0.6", "default": "C3", "delta": "C0", "random": "k", "tpe": "C2", "tpe-halving": "C1"}
    for axis, task in zip(axes[0], tasks, strict=True):
        results = json.loads(path_of(task).read_text())
        time = default_seconds(results)
        times = np.geomspace(time / 20, 10 * time, 200)
        for method, color in colors.items():
            for start, style in {**dict(zip(STARTS, (":", "--", "-"), strict=True)), "any": "-"}.items():
                runs = [cell if start == "any" else [cell] for cell in cells_of(results, method, start)]
                if runs:
                    losses = np.mean([best_so_far(trials, times) for trials in runs], axis=0)
                    total = min(sum(map(seconds_of, trials)) for trials in runs)
                    label = method if start == "any" else f"{method}, from {start}"
                    axis.plot(times[times <= total], losses[times <= total], style, color=color, label=label)
        axis.set(xscale="log", xlabel="seconds", ylabel="best validation loss so far", title=task)
        least = min(
            trial["valid"] for cell in results.values() for trial in (cell if isinstance(cell, list) else [cell])
        )
        axis.set_ylim(0.95 * least, 2 * least)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(tasks: Sequence[str]) -> None:
    for task in tasks:
        results = json.loads(path_of(task).read_text())
        print(f"\n{task}\n\n{table(results)}\n\n{gap_closed(results)}")
    if tasks:
        plot(tasks, ROOT / "docs" / "tuning.png")
