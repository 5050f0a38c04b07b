"""Pictures of a history: a panel each for losses, metrics, hyperparameters by kind, σ and diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Lines = dict[str, list[float]]  # label → a number per epoch, NaN where there is none
Groups = dict[str, Lines]  # "loss", "metric", "hyperparameter", "scale", "diagnostics" → its columns
LOG_FROM = 10.0  # largest over smallest value, from where on an axis is logarithmic
LOGARITHMIC = ("decay", "norm")  # ends of the names of strengths that have such ranges
BESIDE = 6  # lines, from where on the legend is beside the axes, and colours are in the order of the names
MOST_LABELS = 24


@dataclass
class Panel:
    """One pair of axes.

    lines: for "schedule" with one number more, which is the start.
    group: as of `Groups`; "schedule" for hyperparameters.
    names: {label: hyperparameter} of a schedule.
    """

    title: str
    lines: Lines
    group: str
    names: dict[str, str] = field(default_factory=dict)

    def logarithmic(self) -> bool:
        """Whether the numbers live on a logarithmic scale, and vary enough to show it."""
        if self.group != "loss" and not self.title.endswith(LOGARITHMIC):
            return False
        values = [value for line in self.lines.values() for value in line if math.isfinite(value)]
        return bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)


def panels(groups: Groups, start: dict[str, float]) -> list[Panel]:
    """The panels of a history.

    groups, start: `History.groups()` and `History.start`.

    The scales σ have no panel where they never move, the time of an epoch and diagnostics that are zero throughout have none.
    """
    losses = {name.removesuffix("_loss").replace("_", " "): line for name, line in groups.get("loss", {}).items()}
    result = [Panel("loss", losses, "loss")]
    result += [Panel(name.replace("_", " "), {name: line}, "metric") for name, line in groups.get("metric", {}).items()]
    kinds: Groups = {}
    for name, line in groups.get("hyperparameter", {}).items():
        kinds.setdefault(name.rpartition(".")[2], {})[name] = [start.get(name, math.nan), *line]
    for kind, lines in kinds.items():
        title = kind.replace("_", " ") if len(lines) > 1 else next(iter(lines))
        names = {name.removesuffix(f".{kind}"): name for name in lines}
        names = names if len(names) == len(lines) else {name: name for name in lines}  # "dropout" and "dropout.dropout"
        result.append(Panel(title, {label: lines[name] for label, name in names.items()}, "schedule", names))
    scales = {name.partition(":")[2]: line for name, line in groups.get("scale", {}).items()}
    if any(value != line[0] for line in scales.values() for value in line):
        result.append(Panel("perturbation scale σ", scales, "scale"))
    shown = {name: line for name, line in groups.get("diagnostics", {}).items() if name != "seconds" and any(line)}
    diagnostics = {name.replace("_", " "): line for name, line in shown.items()}
    return result + ([Panel("diagnostics", diagnostics, "diagnostics")] if diagnostics else [])


def figure_class(what: str) -> type[Figure]:
    """matplotlib's Figure.

    what: the function that needs it, for the error.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'fxstn[plot]'") from error
    return Figure


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write an image in the format of its suffix, PNG without one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format=path.suffix[1:] or "png")


def _draw_lines(axis: Axes, panel: Panel, many: bool) -> dict[str, Line2D]:
    """Draw the lines of a panel that have a point; returns them by label."""
    from matplotlib import colormaps

    drawn = {}
    for number, (label, values) in enumerate(panel.lines.items()):
        color = colormaps["turbo"](0.04 + 0.92 * number / (len(panel.lines) - 1)) if many else f"C{number}"
        first = 0 if panel.group == "schedule" else 1
        points = [(epoch, value) for epoch, value in enumerate(values, first) if math.isfinite(value)]
        marker = "." if len(values) <= 40 and not many else None
        if points:
            [drawn[label]] = axis.plot(*zip(*points, strict=True), color=color, marker=marker, lw=1.4, ms=4)
    return drawn


def _label_lines(axis: Axes, lines: Mapping[str, Line2D], many: bool) -> None:
    """Draw the legend, beside the axes where there are many lines.

    The texts are set afterwards and are no mathematics: matplotlib leaves out names with a leading underscore, and reads $.
    """
    every = math.ceil(len(lines) / MOST_LABELS)
    labels, shown = list(lines)[::every], list(lines.values())[::every]
    beside = {"fontsize": 6, "loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "frameon": False, "labelspacing": 0.25}
    legend = axis.legend(shown, [str(number) for number in range(len(shown))], **(beside if many else {"fontsize": 7}))
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)


def _set_axes(axis: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    numbers = {value for line in panel.lines.values() for value in line if math.isfinite(value)}
    if len(numbers) == 1 and (constant := numbers.pop()) > 0:
        axis.set_ylim(0, 2 * constant)  # what never moved is no reason to zoom in
    if panel.logarithmic():
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    epochs = max(map(len, panel.lines.values())) - (panel.group == "schedule")
    axis.set_xlim(-0.03 * epochs, 1.03 * epochs)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_title(panel.title, fontsize=10, parse_math=False)
    axis.set_xlabel("epoch (dotted: the best one)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.grid(alpha=0.3, lw=0.6)


def draw(axis: Axes, panel: Panel, best: int) -> None:
    """Draw a panel.

    best: the epoch that a dotted line marks.
    """
    many = len(panel.lines) > BESIDE
    lines = _draw_lines(axis, panel, many)
    axis.axvline(best, color="0.35", lw=0.9, ls=":")
    _set_axes(axis, panel)
    if len(lines) > 1:
        _label_lines(axis, lines, many)


def figure_of(shown: Sequence[Panel], best: int, what: str, columns: int = 1) -> Figure:
    """A figure of some panels. Raises ImportError without matplotlib.

    best: the epoch that a dotted line marks.
    what: needs matplotlib, says the error.
    """
    rows = -(-len(shown) // columns)
    figure = figure_class(what)(figsize=(4.8 * columns, 3.0 * rows), layout="constrained")
    for part, panel in zip(figure.subfigures(rows, columns, squeeze=False).flatten(), shown, strict=False):
        draw(part.subplots(), panel, best)  # figures of their own: a legend beside one panel moves no other
    return figure
