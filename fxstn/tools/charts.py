"""Line charts as SVG. A page shows them without a script; that of report.html adds values under the pointer.

They are written here, and not by a library: plotly adds megabytes of script to each report, and matplotlib's SVG has outlines
of letters in place of text, no values under the pointer and no dark mode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fxstn.bilevel.plots import Panel

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 38  # margins
FEW = 6  # lines that have colours and a legend; more of them shade from the first to the last
SPARK_WIDTH, SPARK_HEIGHT, SPARK_POINTS = 90, 20, 60


@dataclass(frozen=True)
class Scale:
    """A map of numbers to [0, 1].

    low, high: the ends. log: whether in logarithms; then low > 0.
    """

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers between the ends."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [value for p in powers for f in factors if self.low <= (value := f * 10.0**p) <= self.high]
                if len(ticks) <= most:
                    return ticks
            return ticks[:: math.ceil(len(ticks) / most)]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _scale_of(values: Sequence[float], log: bool) -> Scale:
    """With a little room around the values; from 0 where nothing ever moved."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.04
        return Scale(low / room, high * room, True)
    if low == high:
        return Scale(0.0, 2 * low) if low > 0 else Scale(low - 1, low + 1)
    room = 0.04 * (high - low)
    return Scale(low - room if low < 0 or low > room else 0.0, high + room)


def _points(values: Sequence[float], first: int, epochs: int, scale: Scale) -> list[str]:
    """Coordinates of a line. Some columns are not measured in every epoch: the line joins the others."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return [
        f"{LEFT + width * epoch / epochs:.1f},{TOP + height * (1 - scale.share(value)):.1f}"
        for epoch, value in enumerate(values, first)
        if math.isfinite(value)
    ]


def _shape(points: Sequence[str]) -> str:
    """A line, or a dot where there is one point alone."""
    if len(points) == 1:
        return "<circle r='3' cx='{}' cy='{}'/>".format(*points[0].split(","))
    return f"<polyline points='{' '.join(points)}'/>" if points else ""


def _axes(scale: Scale, epochs: int, best: int) -> str:
    parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in scale.ticks():
        y = TOP + (bottom - TOP) * (1 - scale.share(tick))
        parts.append(f"<path class='grid' d='M{LEFT} {y:.1f}H{right}'/>"
                     f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:.4g}</text>")  # fmt: skip
    for tick in Scale(0, epochs).ticks():
        if tick == int(tick):
            x = LEFT + (right - LEFT) * tick / epochs
            parts.append(f"<text x='{x:.1f}' y='{bottom + 17}' text-anchor='middle'>{int(tick)}</text>")
    parts.append(f"<text x='{(LEFT + right) / 2}' y='{HEIGHT - 4}' text-anchor='middle'>epoch</text>")
    x = LEFT + (right - LEFT) * best / epochs
    return "".join(parts) + f"<path class='at-best' d='M{x:.1f} {TOP}V{bottom}'/>"


def color(number: int, count: int) -> str:
    """The class, or the style, that colours a line."""
    if count <= FEW:
        return f"class='line c{number}'"
    return f"class='line many' style='--h:{round(300 * number / (count - 1))}'"


def _spoken(panel: Panel) -> str:
    """What a chart shows, in words, for those who do not see it."""
    lines = {name: [value for value in line if math.isfinite(value)] for name, line in panel.lines.items()}
    texts = [f"{name} from {line[0]:.3g} to {line[-1]:.3g}" for name, line in lines.items() if line]
    more = f", and {len(texts) - FEW} more" if len(texts) > FEW else ""
    return f"{panel.title} over epochs: {', '.join(texts[:FEW])}{more}"


def chart(panel: Panel, best: int) -> str:
    """A figure of a panel; "" where nothing is a finite number.

    best: the epoch that a dotted line marks.
    """
    finite = [value for line in panel.lines.values() for value in line if math.isfinite(value)]
    if not finite:
        return ""
    first = 0 if panel.group == "schedule" else 1
    epochs = max(1, max(map(len, panel.lines.values())) - 1 + first)
    scale = _scale_of(finite, panel.logarithmic())
    count, lines, legend = len(panel.lines), [], []
    for number, (name, values) in enumerate(panel.lines.items()):
        shape = _shape(_points(values, first, epochs, scale))
        look = color(number, count)
        lines.append(f"<g {look} data-name='{escape(panel.names.get(name, name))}'>{shape}</g>")
        legend.append(f"<span {look}><i></i>{escape(name)}</span>")
    key = "".join(legend) if 1 < count <= FEW else ""
    note = f"{count} lines: point at one, or tap it, for its name" if count > FEW else key
    data = {"first": first, "epochs": epochs, "low": scale.low, "high": scale.high, "log": scale.log,
            "names": list(panel.lines), "values": [[_short(value) for value in line] for line in panel.lines.values()],
            "frame": [LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM]}  # fmt: skip
    return (
        f"<figure class='chart' data-chart='{escape(json.dumps(data, separators=(',', ':')))}'>"
        f"<figcaption>{escape(panel.title)}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' tabindex='0' aria-label='{escape(_spoken(panel))}'>"
        f"{_axes(scale, epochs, best)}{''.join(lines)}<path class='cross' d=''/></svg>"
        f"<div class='legend'>{note}</div><div class='tip' hidden></div></figure>"
    )


def _short(value: float) -> float | None:
    """Four digits; None, which JSON has for it, where a number is missing."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def spark(values: Sequence[float], scale: Scale) -> str:
    """A small line without axes, for a cell of a table.

    scale: of the range, or of the values themselves.
    """
    every = max(1, math.ceil(len(values) / SPARK_POINTS))
    chosen = [*values[::every], values[-1]] if every > 1 else list(values)
    last = max(1, len(chosen) - 1)
    points = " ".join(
        f"{SPARK_WIDTH * i / last:.0f},{1 + (SPARK_HEIGHT - 2) * (1 - scale.share(value)):.1f}"
        for i, value in enumerate(chosen)
        if math.isfinite(value)
    )
    box = f"0 0 {SPARK_WIDTH} {SPARK_HEIGHT}"
    return f"<svg class='spark' viewBox='{box}' aria-hidden='true'><polyline points='{points}'/></svg>"
