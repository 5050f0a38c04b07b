"""fxstn.show: what the range of each augmentation means, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxstn.hp import Mixing, Operation
from fxstn.ir.graphs import forked_rng


def strengths_of(spec: Operation, name: str, columns: int) -> list[list[float]]:
    """Strengths for each column: one number from low to high, the others of its spec at their starts."""
    number = spec.numbers[name]
    values = torch.linspace(number.low, number.high, columns)
    values = values.floor() if number.integer else values
    return [[value if other == name else n.init for other, n in spec.numbers.items()] for value in values.tolist()]


def _row(spec: Operation, batch: Tensor, strengths: list[list[float]], seed: int) -> Tensor:
    """The first image of a batch at each of the strengths, with one random draw: the clearest of eight."""

    def drawn(number: int, given: list[float]) -> Tensor:
        with forked_rng():
            torch.manual_seed(8 * seed + number)
            return spec.function(batch, *given, **spec.settings)[0]

    change = [
        (drawn(i, strengths[-1]).float() - drawn(i, strengths[0]).float()).square().sum().item() for i in range(8)
    ]
    return torch.stack([drawn(change.index(max(change)), given) for given in strengths])


def show(specs: Sequence[Operation], images: Tensor, path: str | Path, *, columns: int = 7, seed: int = 0) -> None:
    """Draw a grid into an image file: rows are hyperparameters, columns their strength from low to high.

    specs: augmentations, such as `hp.ColorJitter()`. images: (n, channels, H, W), uint8 or in [0, 1]; rows take turns. A row
    has one random draw, so that only the strength differs. Raises ImportError without matplotlib (fxstn[plot]) and
    ValueError where there is nothing to show.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fxstn.show needs matplotlib: pip install 'fxstn[plot]'") from error
    rows = [(spec, name) for spec in specs for name in spec.numbers]
    if not rows or columns < 2:
        raise ValueError(f"fxstn.show needs a spec with numbers and at least 2 columns, got {list(specs)!r}, {columns}")
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for place, (spec, name) in enumerate(rows):
        strengths = strengths_of(spec, name, columns)
        batch = images.roll(-(place % len(images)), 0)
        row = _row(spec, batch if isinstance(spec, Mixing) else batch[:1], strengths, seed + place)
        at = list(spec.numbers).index(name)
        for axis, image, given in zip(axes[place], row, strengths, strict=True):
            axis.imshow(image.movedim(0, -1).expand(-1, -1, 3).cpu().numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{given[at]:.3g}", fontsize=8, pad=2)
        axes[place][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.savefig(path, dpi=75)
