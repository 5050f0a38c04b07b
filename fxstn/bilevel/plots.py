"""Pictures of a history: losses, metrics, the schedules of the hyperparameters, σ and diagnostics, a panel each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxstn.bilevel.history import History

LOG_FROM = 10.0  # largest over smallest value, from where on an axis is logarithmic
LOGARITHMIC = ("decay", "norm")  # how names of strengths end that have such ranges
BESIDE = 6  # lines, from where on the legend is beside the axes, and the colours are in the order of the names
MOST_LABELS = 24


@dataclass
class Panel:
    """lines: label → a number per row of the history, NaN where there is none, or one more, which is the start."""

    title: str
    lines: dict[str, list[float]]
    group: str

    def logarithmic(self) -> bool:
        """Numbers that live on a logarithmic scale, and vary enough to show it."""
        if self.group != "loss" and not self.title.endswith(LOGARITHMIC):
            return False
        values = [value for line in self.lines.values() for value in line if math.isfinite(value)]
        return bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)


def panels(history: History) -> list[Panel]:
    """Losses; each metric; hyperparameters by kind, from their start on; σ, unless it is kept; diagnostics."""
    groups: dict[str, dict[str, list[float]]] = {}
    for column in history.columns():
        line = [float(row.get(column, math.nan)) for row in history]
        groups.setdefault(history.group(column), {})[column] = line
    losses = {name.removesuffix("_loss"): line for name, line in groups.get("loss", {}).items()}
    found = [Panel("loss", losses, "loss")]
    found += [Panel(name.replace("_", " "), {name: line}, "metric") for name, line in groups.get("metric", {}).items()]
    kinds: dict[str, dict[str, list[float]]] = {}
    for name, line in groups.get("hyperparameter", {}).items():
        line = [history.start.get(name, math.nan), *line]
        kinds.setdefault(name.rpartition(".")[2], {})[name] = line
    for kind, lines in kinds.items():
        title = kind.replace("_", " ") if len(lines) > 1 else next(iter(lines))
        found.append(Panel(title, {name.removesuffix(f".{kind}"): line for name, line in lines.items()}, "schedule"))
    scales = {name.partition(":")[2]: line for name, line in groups.get("scale", {}).items()}
    if any(value != line[0] for line in scales.values() for value in line):
        found.append(Panel("perturbation scale σ", scales, "scale"))
    diagnostics = {n.replace("_", " "): line for n, line in groups.get("diagnostics", {}).items() if n != "seconds"}
    return found + ([Panel("diagnostics", diagnostics, "diagnostics")] if diagnostics else [])


def figure_class(what: str) -> Any:
    """matplotlib's Figure. Raises ImportError, that says what needs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'fxstn[plot]'") from error
    return Figure


def draw(axis: Any, panel: Panel, best: int) -> None:
    """best: the epoch that a line marks."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    many = len(panel.lines) > BESIDE
    every = math.ceil(len(panel.lines) / MOST_LABELS)
    for number, (label, values) in enumerate(panel.lines.items()):
        color = colormaps["turbo"](0.04 + 0.92 * number / (len(panel.lines) - 1)) if many else f"C{number}"
        first = 0 if panel.group == "schedule" else 1
        points = [(epoch, value) for epoch, value in enumerate(values, first) if math.isfinite(value)]
        shown = label if number % every == 0 else "_"  # matplotlib leaves these out of the legend
        marker = "." if len(values) <= 40 and not many else None
        axis.plot(*zip(*points, strict=True), label=shown, color=color, marker=marker, lw=1.4, ms=4)
    axis.axvline(best, color="0.35", lw=0.9, ls=":")
    numbers = {value for line in panel.lines.values() for value in line if math.isfinite(value)}
    if len(numbers) == 1 and (kept := numbers.pop()) > 0:
        axis.set_ylim(0, 2 * kept)  # what never moved is no reason to zoom in
    if panel.logarithmic():
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    epochs = max(map(len, panel.lines.values())) - (panel.group == "schedule")
    axis.set_xlim(-0.03 * epochs, 1.03 * epochs)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("epoch", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.grid(alpha=0.3, lw=0.6)
    if many:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, labelspacing=0.25)
    elif len(panel.lines) > 1:
        axis.legend(fontsize=7)


def drawn(shown: Sequence[Panel], best: int, what: str, columns: int = 1) -> Any:
    """A Figure of these panels. Raises ImportError, that says what needs matplotlib."""
    rows = -(-len(shown) // columns)
    figure = figure_class(what)(figsize=(4.8 * columns, 3.0 * rows), layout="constrained")
    for part, panel in zip(figure.subfigures(rows, columns, squeeze=False).flatten(), shown, strict=False):
        draw(part.subplots(), panel, best)  # figures of their own: a legend beside one panel moves no other
    return figure
