"""The report of benchmarks/tuning.py, from its JSON files alone: tables, and docs/results/tuning.png."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.trials import SEARCHES

ROOT = Path(__file__).resolve().parent.parent
STARTS = {"low": 0.05, "middle": 0.3, "high": 0.7}  # of dropout; as shares of the range in log space for weight decay
LONG = 10  # trials of a search worth a line of its own
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


def _mean(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}" if values else ""


def cells_of(results: dict[str, Any], method: str, start: str) -> dict[str, Any]:
    """{seed: a cell, or the trials of a search (start "any")}."""
    keys = [key.split() for key in results]
    return {seed: results[f"{m} {s} {seed}"] for m, s, seed in keys if (m, s) == (method, start)}


def default_seconds(results: dict[str, Any]) -> float:
    """Mean time of a run with the default settings; of any run where there is none. "unlimited" and "uncertain" take the same
    steps: the slowest of them counts, since how busy the machine was differs more than they do."""
    runs = [cell for cell in results.values() if isinstance(cell, dict)]
    same = [
        [cell for start in STARTS for cell in cells_of(results, method, start).values()]
        for method in ("default", "unlimited", "uncertain")
    ]
    return max(statistics.mean(map(seconds_of, cells)) for cells in ([c for c in same if c] or [runs]))


def searched(results: dict[str, Any], method: str, seconds: float = float("inf"), trials: int = 0) -> dict[str, Cell]:
    """{seed: the best trial of a search that begins within a time}, of the seeds with at least so many trials."""
    found = cells_of(results, method, "any")
    return {seed: best_within(cells, seconds) for seed, cells in found.items() if len(cells) >= trials}


def _paired(cells: dict[str, Cell], others: dict[str, Cell]) -> str:
    """Mean and deviation of the differences in validation loss over the seeds that both have: these share their data."""
    return _mean([cell["valid"] - others[seed]["valid"] for seed, cell in cells.items() if seed in others], "+")


def table(results: dict[str, Any]) -> str:
    """A line for each method and start: means ± standard deviations over seeds; searches at "default"'s time and in all."""
    time = default_seconds(results)
    rivals = searched(results, "random", time)
    rows = []

    def line(label: str, start: str, cells: dict[str, Cell], seconds: float, untuned: dict[str, Cell]) -> None:
        losses = [_mean([cell[part] for cell in cells.values()]) for part in ("valid", "test")]
        differences = [_paired(cells, others) for others in (untuned, rivals)]
        rows.append([label, start, *losses, *differences, f"{seconds:.0f}", len(cells)])

    for method in dict.fromkeys(key.split()[0] for key in results):
        for start in STARTS:
            if cells := cells_of(results, method, start):
                seconds = statistics.mean(map(seconds_of, cells.values()))
                line(method, start, cells, seconds, cells_of(results, "untuned", start) if method != "untuned" else {})
    for method in SEARCHES:
        if searches := cells_of(results, method, "any"):
            line(f"{method}, same time", "", searched(results, method, time), time, {})
            most = max(map(len, searches.values()))
            if most < LONG:
                continue
            whole = [sum(map(seconds_of, trials)) for trials in searches.values() if len(trials) == most]
            line(f"{method}, {most} trials", "", searched(results, method, trials=most), statistics.mean(whole), {})
    headers = ["method", "start", "best validation loss", "test loss there", "less untuned", "less random, same time",
               "seconds", "seeds"]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def overview(results: dict[str, dict[str, Any]]) -> str:
    """A line for each task: best validation losses, means over seeds; – where nothing was run."""

    def loss(cells: dict[str, Cell]) -> str:
        return f"{statistics.mean(cell['valid'] for cell in cells.values()):.3f}" if cells else "–"

    rows = []
    for task, found in results.items():
        time, most = default_seconds(found), most_trials(found)
        by_start = [
            " / ".join(loss(cells_of(found, method, start)) for start in STARTS) for method in ("untuned", "default")
        ]
        best = f"{loss(searched(found, 'random', trials=most))} ({most})" if most >= LONG else "–"
        same_time = [loss(searched(found, method, time)) for method in ("random", "tpe")]
        rows.append([task, *by_start, *same_time, best])
    headers = ["task", "untuned: low / middle / high start", "fxstn, from these", "random search, same time",
               "TPE, same time", "best random trial (of)"]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def most_trials(results: dict[str, Any]) -> int:
    """Of random search, for the seed that has most."""
    return max(map(len, cells_of(results, "random", "any").values()), default=0)


def gap_closed(results: dict[str, Any]) -> str:
    """How much of the way from "untuned" to the best of a long random search "default" goes, from each start.

    Only where that way is longer than its spread over seeds, or, with one search, than that of "untuned"."""
    most = most_trials(results)
    best = searched(results, "random", trials=most)
    parts = []
    for start in STARTS if most >= LONG else ():
        ours, plain = (cells_of(results, method, start) for method in ("default", "untuned"))
        if seeds := [seed for seed in best if seed in ours and seed in plain]:
            from_, to, goal = (statistics.mean(c[seed]["valid"] for seed in seeds) for c in (plain, ours, best))
            gaps = [plain[seed]["valid"] - best[seed]["valid"] for seed in seeds]
            spread = gaps if len(gaps) > 1 else [cell["valid"] for cell in plain.values()]
            wide = len(spread) < 2 or from_ - goal > statistics.stdev(spread)
            share = (
                f"{100 * (from_ - to) / (from_ - goal):.0f} %" if wide and from_ > goal else "no gap beyond the spread"
            )
            parts.append(f"{start} {share} ({from_:.4f}, {to:.4f}, {goal:.4f})")
    if not parts:
        return "No long search was run"
    return (
        f"Share of the gap between untuned and the best of {most} random trials that the default closes: {'; '.join(parts)}. "
        "In brackets are untuned, the default and that best, over the seeds with so long a search"
    )


def best_so_far(trials: Sequence[Cell], times: Sequence[float]) -> list[float]:
    """Least validation loss known at each time, over trials made one after the other; NaN before the first epoch."""
    begun = itertools.accumulate(map(seconds_of, trials), initial=0.0)
    points = [(start + t, loss) for trial, start in zip(trials, begun, strict=False) for t, loss in trial["curve"]]
    return [min((loss for t, loss in points if t <= time), default=float("nan")) for time in times]


def plot(tasks: Sequence[str], path: Path) -> None:
    """Best validation loss against time in plain training runs, mean over seeds, a panel for each task."""
    import matplotlib.pyplot as plt
    import numpy as np

    columns = min(3, len(tasks))
    figure, axes = plt.subplots(
        -(-len(tasks) // columns), columns, figsize=(4.6 * columns, 3.4 * -(-len(tasks) // columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    colors = {"untuned": "0.6", "default": "C3", "random": "k"}
    styles = {"low": ":", "middle": "--", "high": "-", "any": "-"}
    for axis, task in zip(axes.flat, tasks, strict=False):
        results = json.loads(path_of(task).read_text())
        plain = statistics.mean(seconds_of(c) for start in STARTS for c in cells_of(results, "untuned", start).values())
        times, ends = np.geomspace(0.1, 30, 300), []
        for method, start in ((m, s) for m in colors for s in styles):
            cells = cells_of(results, method, start).values()
            runs = [cell if start == "any" else [cell] for cell in cells]
            if start == "any":  # those with most trials, so that all last as long
                runs = [trials for trials in runs if len(trials) == most_trials(results)]
            if not runs:
                continue
            losses = np.mean([best_so_far(trials, plain * times) for trials in runs], axis=0)
            until = times <= 1.02 * max(sum(map(seconds_of, trials)) for trials in runs) / plain
            label = (
                "random search" if start == "any" else f"{'fxstn' if method == 'default' else method}, {start} start"
            )
            axis.plot(times[until], losses[until], styles[start], color=colors[method], label=label)
            ends.append(losses[until][-1])
        axis.set(xscale="log", title=task, xticks=(0.1, 0.3, 1, 3, 10, 30), xlim=(0.1, 30))
        axis.set_xticklabels(["0.1", "0.3", "1", "3", "10", "30"])
        axis.minorticks_off()
        axis.set_ylim(0.9 * min(ends), 2.2 * min(ends))
    for axis in list(axes.flat)[len(tasks) :]:
        axis.remove()
    for axis in axes[-1]:
        axis.set_xlabel("time, in plain training runs")
    for axis in axes[:, 0]:
        axis.set_ylabel("best validation loss so far")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(tasks: Sequence[str]) -> None:
    for task in tasks:
        results = json.loads(path_of(task).read_text())
        print(f"\n{task}\n\n{table(results)}\n\n{gap_closed(results)}")
    if tasks:
        plot(tasks, ROOT / "docs" / "results" / "tuning.png")
