"""Augmentations that move the pixels of images (batch, channels, H, W): mirror images, affine maps and rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from fxstn.hp.augment import BOTH, SHARES, ByChance, Range, spread
from fxstn.hp.checks import FILL, NUMBER, Check, choice, optional, reals
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.moving import Moving
from fxstn.hp.operation import Settings, Strength
from fxstn.ops.geometry import inverse_affine, moved_points, resample, rescaled
from fxstn.ops.noise import by_example, uniform

if TYPE_CHECKING:
    from torchvision.transforms import v2

Size = tuple[int, int]  # (H, W)
SAMPLING = {
    "mode": choice("bilinear", "nearest"), "fill": FILL, "center": optional(reals(2)), "target_fill": NUMBER
}  # fmt: skip


class Flip(Moving, ByChance):
    """Probability, in [0, 1], of a mirror image, left to right. Takes over `v2.RandomHorizontalFlip`.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    images = True
    numbers: Mapping[str, Hyperparameter] = {"flip": Hyperparameter(0.5, 0, 1)}

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, x.flip(-1), x)

    move_map = apply

    @staticmethod
    def move_points(points: Tensor, drawn: Tensor, size: Size) -> Tensor:
        x, y = points.split(1, -1)
        return torch.cat([torch.where(drawn.view(-1, 1, 1), size[1] - x, x), y], -1)


class VerticalFlip(Moving, ByChance):
    """Probability, in [0, 1], of a mirror image, top to bottom. Takes over `v2.RandomVerticalFlip`.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    images = True
    numbers: Mapping[str, Hyperparameter] = {"vertical_flip": Hyperparameter(0.5, 0, 1)}

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, x.flip(-2), x)

    move_map = apply

    @staticmethod
    def move_points(points: Tensor, drawn: Tensor, size: Size) -> Tensor:
        x, y = points.split(1, -1)
        return torch.cat([x, torch.where(drawn.view(-1, 1, 1), size[0] - y, y)], -1)


class _Mapped(Moving):
    """Base of affine maps. What is drawn are the matrices of `inverse_affine`."""

    images = True
    apply = staticmethod(resample)

    @staticmethod
    def move_map(maps: Tensor, drawn: Tensor, *, target_fill: float, **settings: object) -> Tensor:
        return resample(maps, drawn, mode="nearest", fill=(target_fill,))

    @staticmethod
    def move_points(points: Tensor, drawn: Tensor, size: Size, **settings: object) -> Tensor:
        return moved_points(points, drawn, size)

    @staticmethod
    def at_scale(drawn: Tensor, ratio: Range) -> Tensor:
        return rescaled(drawn, ratio)


class Affine(_Mapped):
    """Rotation and shear by ± strength degrees in [0, 45], translation by ± strength of the size in [0, 0.5] (whole pixels),
    scale by 1 ± strength in [0, 0.5]. As `v2.RandomAffine`, which it takes over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    mode: "bilinear" or "nearest".
    fill: what is outside of the image, a tuple of one value or one per channel; None: 0.
    center: (x, y) in pixels; None: the middle.
    target_fill: what masks in the target are outside of the image, the class that the loss ignores say.
    """

    numbers: Mapping[str, Hyperparameter] = {
        "rotation": Hyperparameter(10, 0, 45),
        "translate": Hyperparameter(0.1, 0, 0.5),
        "scale": Hyperparameter(0.1, 0, 0.5),
        "shear": Hyperparameter(5, 0, 45),
    }
    defaults: Mapping[str, object] = {
        "rotation": BOTH, "translate": (1.0, 1.0), "zoom": BOTH, "shear": (*BOTH, 0.0, 0.0), "mode": "bilinear",
        "fill": None, "center": None, "target_fill": 0.0,
    }  # fmt: skip
    checks: Mapping[str, Check] = {
        "rotation": SHARES,
        "translate": reals(2, 0, 1),
        "zoom": SHARES,
        "shear": reals(4, -1, 1),
        **SAMPLING,
    }

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


class Rotation(_Mapped):
    """Rotation by ± strength degrees, in [0, 180]. As `v2.RandomRotation` without expand, which it takes over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    mode, fill, center, target_fill: as of `hp.Affine`.
    """

    numbers: Mapping[str, Hyperparameter] = {"rotation": Hyperparameter(10, 0, 180)}
    defaults: Mapping[str, object] = {"rotation": BOTH, "mode": "bilinear", "fill": None, "center": None,
                                      "target_fill": 0.0}  # fmt: skip
    checks: Mapping[str, Check] = {"rotation": SHARES, **SAMPLING}

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
    fill, target_fill = module.fill, 0.0
    if isinstance(fill, Mapping):
        if others := set(fill) - {tv_tensors.Image, tv_tensors.Mask}:
            raise NotImplementedError(f"{type(module).__name__} with a fill per type of input, {others}")
        fill, target_fill = fill.get(tv_tensors.Image, 0), float(fill.get(tv_tensors.Mask) or 0)
    filled = tuple(map(float, fill)) if isinstance(fill, (list, tuple)) else (float(fill or 0),)
    mode = module.interpolation.value if hasattr(module.interpolation, "value") else str(module.interpolation)
    center = tuple(module.center) if module.center is not None else None
    return {"mode": mode, "fill": filled, "center": center, "target_fill": target_fill}


def _from_middle(center: Range | None, x: Tensor) -> Range:
    """A point in pixels from the top left corner, as pixels from the middle of the image."""
    if center is None:
        return 0.0, 0.0
    return center[0] - x.shape[-1] / 2, center[1] - x.shape[-2] / 2
