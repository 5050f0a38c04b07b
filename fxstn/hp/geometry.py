"""Augmentations that move the pixels of images (batch, channels, H, W): affine maps and rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fxstn.hp.augment import BOTH, Range, spread
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation, Settings, Strength
from fxstn.ops.geometry import inverse_affine, resample
from fxstn.ops.noise import by_example, uniform

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Affine(Operation):
    """Rotation and shear by ± strength degrees in [0, 45], translation by ± strength of the size in [0, 0.5] (whole pixels),
    scale by 1 ± strength in [0, 0.5]. As `v2.RandomAffine`, which it takes over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    mode: "bilinear" or "nearest".
    fill: what is outside of the image, a tuple of one value or one per channel; None: 0.
    center: (x, y) in pixels; None: the middle.
    """

    numbers: Mapping[str, Hyperparameter] = {
        "rotation": Hyperparameter(10, 0, 45),
        "translate": Hyperparameter(0.1, 0, 0.5),
        "scale": Hyperparameter(0.1, 0, 0.5),
        "shear": Hyperparameter(5, 0, 45),
    }
    defaults: Mapping[str, object] = {
        "rotation": BOTH, "translate": (1.0, 1.0), "zoom": BOTH, "shear": (*BOTH, 0.0, 0.0), "mode": "bilinear",
        "fill": None, "center": None,
    }  # fmt: skip
    apply = staticmethod(resample)

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        own = cast("v2.RandomAffine", module)
        rotation, scale = spread(own.degrees, 0), spread(own.scale, 1)
        translate = max(own.translate or (0.0,))
        sides = tuple(float(side) / translate for side in own.translate) if translate else (1.0, 1.0)
        shear = [float(angle) for angle in (own.shear or ())]
        most = max(map(abs, shear), default=0.0)
        angles = [angle / most for angle in shear] if most else [*BOTH]
        angles += [0.0] * (4 - len(angles))
        starts = {"rotation": rotation[0], "translate": translate, "scale": scale[0], "shear": most}
        ranges = {"rotation": rotation[1], "translate": sides, "zoom": scale[1], "shear": tuple(angles)}
        return starts, {**ranges, **_sampling(own)}

    @staticmethod
    def draw(
        x: Tensor, *strengths: Strength, rotation: Range, translate: Range, zoom: Range, shear: tuple[float, ...],
        center: Range | None, **sampling: object,
    ) -> Tensor:  # fmt: skip
        def each(strength: Strength, low: float, high: float) -> Tensor:
            return (by_example(strength, x) * uniform(x, low, high)).flatten()

        (height, width), (rotate, move, resize, slant) = x.shape[-2:], strengths
        sides = zip((width, height), translate, strict=True)
        moves = torch.stack([(size * each(move, -side, side)).round() for size, side in sides], 1)
        low_x, high_x, low_y, high_y = shear
        slants = torch.stack([each(slant, low_x, high_x), each(slant, low_y, high_y)], 1)
        zooms = 1 + each(resize, *zoom)
        return inverse_affine(each(rotate, *rotation), moves, zooms, slants, _from_middle(center, x))


class Rotation(Operation):
    """Rotation by ± strength degrees, in [0, 180]. As `v2.RandomRotation` without expand, which it takes over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    mode, fill, center: as of `hp.Affine`.
    """

    numbers: Mapping[str, Hyperparameter] = {"rotation": Hyperparameter(10, 0, 180)}
    defaults: Mapping[str, object] = {"rotation": BOTH, "mode": "bilinear", "fill": None, "center": None}
    apply = staticmethod(resample)

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        own = cast("v2.RandomRotation", module)
        if own.expand:
            raise NotImplementedError("RandomRotation(expand=True), whose images differ in size")
        strength, ends = spread(own.degrees, 0)
        return {"rotation": strength}, {"rotation": ends, **_sampling(own)}

    @staticmethod
    def draw(x: Tensor, *strengths: Strength, rotation: Range, center: Range | None, **sampling: object) -> Tensor:
        angle = -(by_example(strengths[0], x) * uniform(x, *rotation)).flatten()  # v2 turns the other way here
        none = angle.new_zeros(len(angle), 2)
        return inverse_affine(angle, none, torch.ones_like(angle), none, _from_middle(center, x))


def _sampling(module: v2.RandomAffine | v2.RandomRotation) -> Settings:
    """mode, fill and center of a module of torchvision's."""
    fill = module.fill
    if isinstance(fill, Mapping):
        raise NotImplementedError(f"{type(module).__name__} with a fill per type of input")
    filled = tuple(map(float, fill)) if isinstance(fill, (list, tuple)) else (float(fill or 0),)
    mode = module.interpolation.value if hasattr(module.interpolation, "value") else str(module.interpolation)
    return {"mode": mode, "fill": filled, "center": tuple(module.center) if module.center is not None else None}


def _from_middle(center: Range | None, x: Tensor) -> Range:
    """A point in pixels from the top left corner, as pixels from the middle of the image."""
    if center is None:
        return 0.0, 0.0
    return center[0] - x.shape[-1] / 2, center[1] - x.shape[-2] / 2
