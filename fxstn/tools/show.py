"""fxstn.show: what the range of each augmentation means, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxstn.bilevel.plots import save_figure
from fxstn.hp import Mixing, Operation, Spec
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.input_errors import as_file

_ORDER = "the order is fxstn.show(specs, images, path)"


def strengths_of(spec: Operation, name: str, columns: int) -> list[list[float]]:
    """The strengths of a spec for each column: one number goes from low to high, the others stay at their starts."""
    number = spec.numbers[name]
    values = torch.linspace(number.low, number.high, columns)
    values = values.floor() if number.integer else values
    return [[value if other == name else n.init for other, n in spec.numbers.items()] for value in values.tolist()]


def _row(spec: Operation, batch: Tensor, strengths: list[list[float]], seed: int) -> Tensor:
    """The first image of a batch at each of the strengths, with one random draw: of eight, the one that changes it most."""

    def image(attempt: int, values: list[float]) -> Tensor:
        with forked_rng():
            reseed(8 * seed + attempt)
            return spec.function(batch, *values, **spec.settings)[0]

    changes = [
        (image(i, strengths[-1]).float() - image(i, strengths[0]).float()).square().sum().item() for i in range(8)
    ]
    return torch.stack([image(changes.index(max(changes)), values) for values in strengths])


def show(specs: Sequence[Operation], images: Tensor, path: str | Path, *, columns: int = 7, seed: int = 0) -> None:
    """Draw a grid into an image file. A row is a hyperparameter, and its columns go from the low to the high end of its range.

    A row has one random draw, so that only the strength differs.

    specs: augmentations, such as `hp.ColorJitter()`.
    images: (n, channels, H, W), uint8 or in [0, 1]. Rows take turns.
    path: of the image file.
    columns: at least 2.
    seed: a whole number, of the draws.

    Raises ImportError without matplotlib (fxstn[plot]), TypeError for arguments of another kind, and ValueError where there is
    nothing to show.
    """
    _check(specs, images)
    file = as_file(path, "fxstn.show")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fxstn.show needs matplotlib: pip install 'fxstn[plot]'") from error
    rows = [(spec, name) for spec in specs for name in spec.numbers]
    if columns < 2:
        raise ValueError(f"fxstn.show: columns={columns} must be at least 2, the ends of a range")
    if not rows:
        raise ValueError(f"fxstn.show needs a spec with numbers, such as fxstn.hp.Affine(), got {list(specs)!r}")
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for place, (spec, name) in enumerate(rows):
        strengths = strengths_of(spec, name, columns)
        batch = images.roll(-(place % len(images)), 0)
        row = _row(spec, batch if isinstance(spec, Mixing) else batch[:1], strengths, seed + place)
        index = list(spec.numbers).index(name)
        for axis, image, values in zip(axes[place], row, strengths, strict=True):
            axis.imshow(image.movedim(0, -1).expand(-1, -1, 3).cpu().numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{values[index]:.3g}", fontsize=8, pad=2)
        axes[place][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    save_figure(figure, file, dpi=75)


def _check(specs: object, images: object) -> None:
    """Raises TypeError and ValueError for what `show` cannot draw."""
    if isinstance(specs, Spec):
        raise TypeError(f"fxstn.show: specs must be a list, got one {type(specs).__name__}; give [{specs!r}]")
    if not isinstance(specs, (list, tuple)):
        raise TypeError(f"fxstn.show: specs must be a list of augmentations, got {type(specs).__name__}; {_ORDER}")
    for spec in specs:
        if not isinstance(spec, Operation):
            raise TypeError(f"fxstn.show: {spec!r} is no augmentation, such as hp.ColorJitter(), which changes images")
    if not isinstance(images, Tensor):
        raise TypeError(
            f"fxstn.show: images must be a tensor (n, channels, H, W), got {type(images).__name__}; {_ORDER}"
        )
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"fxstn.show: images must be (n, channels, H, W), got {tuple(images.shape)}; for one image give images[None]"
        )
