"""Tables and figures of docs/results/paper.md, from the files under benchmarks/results/paper alone."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.overhead import RESULTS
from benchmarks.paper import inert, linear
from benchmarks.paper.tasks import METHODS, ROWS, START
from benchmarks.tuned import best_so_far, best_within, seconds_of

FOLDER = RESULTS / "paper"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
LABELS = {
    "untuned": "the start kept", "random": "random search", "bayes": "Bayesian opt. (TPE)", "stn": "STN",
    "centered": "centred STN", "delta": "Δ-STN", "default": "Δ-STN, cheap defaults",
}  # fmt: skip
COLOURS = dict(zip(METHODS, ("0.6", "C7", "C5", "C1", "C0", "k", "C3"), strict=True))
LARGEST = {"length": 24, "holes": 5, "rotation": 45, "shear": 45}  # of strengths that are no shares already
APART = "naval-propulsion-plant"  # whose features are nearly collinear
WORDS = {"l2": "weight decay", "dropout": "input dropout", "network": "Jacobian norm"}
Cell = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _cells(results: dict[str, Any], method: str) -> dict[str, Any]:
    """{seed: a run, or the trials of a search}."""
    return {key.split()[1]: value for key, value in results.items() if key.split()[0] == method}


def _trials(value: Any) -> list[Cell]:
    return value if isinstance(value, list) else [value]


def _final(value: Any) -> Cell:
    """The run, or the best trial."""
    return best_within(_trials(value), math.inf)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(row: str, budget: str) -> str:
    """A line for each method: validation and test loss, means ± deviations over seeds, the paper's, time, epochs and seeds."""
    results, published = read(FOLDER / f"{budget}-{row}.json"), ROWS[row].figures
    lines = []
    for method in METHODS:
        if cells := _cells(results, method):
            best = [_final(value) for value in cells.values()]
            minutes = statistics.mean(sum(map(seconds_of, _trials(value))) for value in cells.values()) / 60
            epochs = statistics.mean(sum(len(t["curve"]) for t in _trials(value)) for value in cells.values())
            trials = {len(value) for value in cells.values() if isinstance(value, list)}
            of = f" of {'–'.join(map(str, sorted(trials)))} trials" if trials else ""
            paper = "{:.3f} ({:.3f})".format(*published[method]) if method in published else ""
            losses = [_mean([cell[part] for cell in best]) for part in ("valid", "test")]
            lines.append([LABELS[method], *losses, paper, f"{minutes:.1f}", f"{epochs:.0f}{of}", len(cells)])
    heads = ["method", "validation loss", "test loss", "the paper's, at its budget", "minutes", "epochs", "seeds"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def draw_row(row: str, budget: str, path: Path) -> None:
    """Best validation loss so far by epoch and by time, mean over seeds, and the schedules that Δ-STN found (seed 0)."""
    import matplotlib.pyplot as plt
    import numpy as np

    results = read(FOLDER / f"{budget}-{row}.json")
    figure, (by_epoch, by_time, found) = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    finals = [_final(value)["valid"] for value in results.values()]
    for method in METHODS:
        runs = [_trials(value) for value in _cells(results, method).values()]
        if not runs:
            continue
        style = {"color": COLOURS[method], "label": LABELS[method], "lw": 1.5}
        longest = max(sum(map(seconds_of, trials)) for trials in runs)
        times = np.linspace(0, longest, 200)[1:]
        by_time.plot(times / 60, np.mean([best_so_far(trials, times) for trials in runs], axis=0), **style)
        if len(runs[0]) == 1:
            curves = [[loss for _, loss in trials[0]["curve"]] for trials in runs]
            shortest = min(map(len, curves))
            by_epoch.plot(range(1, shortest + 1), np.mean([curve[:shortest] for curve in curves], axis=0), **style)
    for axis, label in ((by_epoch, "epoch"), (by_time, "minutes")):
        axis.set(xlabel=label, ylabel="best validation loss so far", ylim=(0.95 * min(finals), 2.2 * min(finals)))
        axis.grid(alpha=0.3)
    by_epoch.legend(*by_time.get_legend_handles_labels(), frameon=False, fontsize=8)
    schedule = results.get("delta 0", {}).get("schedule", {})
    for number, (name, values) in enumerate(schedule.items()):
        most = next((most for ending, most in LARGEST.items() if name.endswith(ending)), 1)
        values = [value / most for value in values]
        found.plot(values, lw=1.2, color=plt.cm.turbo(0.05 + 0.9 * number / max(1, len(schedule) - 1)), label=name)
    found.set(xlabel="epoch", title="found by Δ-STN, seed 0\n(holes, lengths, degrees: shares of their largest)")
    found.title.set_fontsize(9)
    if schedule:
        found.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    found.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def robustness(row: str, budget: str) -> dict[tuple[str, float, float], list[float]]:
    """{(method, initial dropout, initial σ): best validation losses, one for each seed}, infinite where a first epoch
    diverged."""
    found: dict[tuple[str, float, float], list[float]] = {}
    for key, cell in read(FOLDER / f"robustness-{budget}-{row}.json").items():
        method, start, scale, _ = key.split()
        found.setdefault((method, float(start), float(scale)), []).append(cell["valid"])
    return found


def robustness_table(found: dict[tuple[str, float, float], list[float]]) -> str:
    """A line for each start."""

    def shown(losses: Sequence[float]) -> str:
        return "diverges" if math.inf in losses else _mean(losses) if losses else ""

    starts = sorted({(scale, start) for _, start, scale in found}, key=lambda at: (at[0] != 1, at))
    lines = [
        [start, scale, *(shown(found.get((method, start, scale), [])) for method in linear.METHODS)]
        for scale, start in starts
    ]
    heads = ["initial dropout", "initial σ", *(LABELS[method] for method in linear.METHODS)]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def draw_robustness(found: dict[tuple[str, float, float], list[float]], path: Path) -> None:
    """Best validation loss over the initial dropout rate and over the initial σ; nothing where a run diverged."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for method in linear.METHODS:
        style: dict[str, Any] = {"color": COLOURS[method], "label": LABELS[method]}
        for axis, place, held, at in ((axes[0], 1, 2, 1.0), (axes[1], 2, 1, START)):
            points = {key[place]: losses for key, losses in found.items() if (key[0], key[held]) == (method, at)}
            xs = [x for x in sorted(points) if math.inf not in points[x]]
            axis.plot(xs, [statistics.mean(points[x]) for x in xs], marker="o", **style)
            for x in xs:
                axis.scatter([x] * len(points[x]), points[x], s=8, color=style["color"], alpha=0.5)
    axes[0].set(xlabel="initial dropout (σ = 1)", ylabel="best validation loss", yscale="log", xlim=(0, 0.95))
    axes[1].set(xlabel=f"initial σ (dropout {START})", xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _by_setting(results: dict[str, Any]) -> dict[tuple[str, str, str], list[Cell]]:
    """{(set, method, σ): runs from every start and seed}."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for key, cell in results.items():
        name, method, _, scale, _ = key.split()
        found.setdefault((name, method, scale), []).append(cell)
    return found


def _excess(runs: Sequence[Cell]) -> str:
    """Median and largest excess validation loss, in per cent."""
    shares = [100 * run["excess"] for run in runs]
    return f"{statistics.median(shares):.2f} ({max(shares):.2f})"


def linear_table(kind: str) -> str:
    """A line for each set: the median and the largest excess validation loss at σ = 1, over starts and seeds, by method."""
    found = _by_setting(read(FOLDER / f"linear-{kind}.json"))
    lines = []
    for name in dict.fromkeys(key[0] for key in found):
        cells = [found[name, method, "1.0"] for method in linear.METHODS]
        lines.append([name, *map(_excess, cells), max(map(len, cells))])
    heads = ["set", *(f"{LABELS[method]}, σ = 1" for method in linear.METHODS), "runs of each"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def scales_table() -> str:
    """A line for each problem that was run at other σ: the excess by method, over all sets but `APART`, starts and seeds."""
    lines = []
    for kind in linear.KINDS:
        found = _by_setting(read(FOLDER / f"linear-{kind}.json"))
        scales = sorted({scale for _, _, scale in found}, key=float)
        for scale in scales if len(scales) > 1 else ():
            cells = [
                [
                    run
                    for (name, m, s), runs in found.items()
                    if name != APART and (m, s) == (method, scale)
                    for run in runs
                ]
                for method in linear.METHODS
            ]
            lines.append([WORDS[kind], f"{float(scale):g}", *map(_excess, cells), max(map(len, cells))])
    heads = ["problem", "σ", *(LABELS[method] for method in linear.METHODS), "runs of each"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def draw_linear(kind: str, path: Path) -> None:
    """λ over hyper steps from every start, seed 0, σ = 1, beside the optimum; a panel for each set."""
    import matplotlib.pyplot as plt

    results = read(FOLDER / f"linear-{kind}.json")
    names = list(dict.fromkeys(key.split()[0] for key in results))
    columns = min(5, len(names))
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(2.9 * columns, 2.5 * -(-len(names) // columns)),
                                layout="constrained", squeeze=False)  # fmt: skip
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        for method in linear.METHODS:
            for key, cell in results.items():
                if key.split()[:2] == [name, method] and key.split()[3:] == ["1.0", "0"]:
                    axis.plot(
                        *zip(*cell["trajectory"], strict=True),
                        color=COLOURS[method],
                        lw=2.5 if method == "centered" else 1,
                    )
                    axis.axhline(cell["optimum"], color="C3", ls="--", lw=1)
        axis.set_title(name, fontsize=9)
        axis.set(yscale="linear" if kind == "dropout" else "log")
        axis.tick_params(labelsize=7)
    handles = [plt.Line2D([], [], color=COLOURS[m], label=LABELS[m]) for m in linear.METHODS]
    handles.append(plt.Line2D([], [], color="C3", ls="--", label="exact optimum"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def inert_table() -> str:
    """Where a hyperparameter without effect went, by method and start: the change of λ, unconstrained."""
    lines = []
    for method in inert.METHODS:
        moves: dict[float, list[float]] = {}
        for key, cell in read(FOLDER / "inert.json").items():
            if key.split()[0] == method:
                start, values = float(key.split()[1]), cell["trajectory"]
                moves.setdefault(start, []).append(_logit(values[-1]) - _logit(start))
        shown = [f"{_mean(of)} ({sum(move > 0 for move in of)} of {len(of)} up)" for of in moves.values()]
        lines.append([LABELS[method], *shown])
    heads = ["method", *(f"from {start}" for start in inert.STARTS)]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def draw_inert(path: Path) -> None:
    """λ over epochs of a hyperparameter without effect, a panel for each method."""
    import matplotlib.pyplot as plt

    results = read(FOLDER / "inert.json")
    figure, axes = plt.subplots(1, len(inert.METHODS), figsize=(11, 2.6), layout="constrained", sharey=True)
    for method, axis in zip(inert.METHODS, axes, strict=True):
        for key, cell in results.items():
            if key.split()[0] == method:
                axis.plot(cell["trajectory"], color=COLOURS[method], lw=1, alpha=0.7)
        axis.axhline(0.5, color="0.5", ls=":", lw=1)
        axis.set(title=LABELS[method], xlabel="epoch", ylim=(0, 1))
    axes[0].set_ylabel("λ, share of its range")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _pictured(text: str, picture: str, file: str) -> str:
    return f"{text}\n\n![{picture}]({file}.png)"


def _linear_part(kind: str) -> str:
    what = "The tuned hyperparameters over hyper steps, against the known optimum"
    return _pictured(linear_table(kind), what, f"paper-{kind}")


def _inert_part() -> str:
    return _pictured(inert_table(), "A hyperparameter that does nothing, over the epochs of a run", "paper-inert")


def _row_part(row: str, budget: str) -> str:
    trials = [t for value in read(FOLDER / f"{budget}-{row}.json").values() for t in _trials(value)]
    machines = sorted({t["machine"] for t in trials if t.get("machine")})
    where = f"On {'; '.join(machines)}. `python -m benchmarks.paper run --task {row} --budget {budget}`"
    what = "Best validation loss by epoch and by time; schedules"
    return _pictured(f"{table(row, budget)}\n\n{where}", what, f"paper-{budget}-{row}")


def _robustness_part(row: str) -> str:
    what = "Best validation loss over initial dropout and σ"
    return _pictured(robustness_table(robustness(row, "small")), what, "paper-robustness")


PARTS: dict[str, Callable[[], str]] = {
    **{f"linear-{kind}": partial(_linear_part, kind) for kind in linear.KINDS},
    "linear-scales": scales_table,
    "inert": _inert_part,
    **{f"{budget}-{row}": partial(_row_part, row, budget) for budget in ("small", "full") for row in ROWS},
    "robustness": partial(_robustness_part, "fmnist"),
}  # of docs/results/paper.md


def draw() -> None:
    """The pictures of docs/results/paper.md, of the results that there are."""
    for kind in linear.KINDS:
        if (FOLDER / f"linear-{kind}.json").exists():
            draw_linear(kind, DOCS / f"paper-{kind}.png")
    if (FOLDER / "inert.json").exists():
        draw_inert(DOCS / "paper-inert.png")
    for budget, row in itertools.product(("small", "full"), ROWS):
        if (FOLDER / f"{budget}-{row}.json").exists():
            draw_row(row, budget, DOCS / f"paper-{budget}-{row}.png")
    draw_robustness(robustness("fmnist", "small"), DOCS / "paper-robustness.png")
