"""Augmentations of images (batch, channels, H, W) inside the graph, on their device, each example at its own strength.

Images are uint8, or floating point in [0, 1]: put `v2.Normalize` into the model, after them. A strength bounds a uniform
draw; 0 leaves images as they are, bit for bit. They act in train mode only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation
from fxstn.ops.color import as_float, gray, jitter, like_before
from fxstn.ops.erase import cutout_mask, erasing_mask
from fxstn.ops.geometry import inverse_affine, resample
from fxstn.ops.noise import by_example, uniform

Range = tuple[float, float]
BOTH: Range = (-1.0, 1.0)


def spread(ends: Range | None, neutral: float) -> tuple[float, Range]:
    """A range around a neutral value as (strength, the range of the draw that it multiplies): neutral + strength · draw."""
    if ends is None:
        return 0.0, BOTH
    low, high = (float(end) - neutral for end in ends)
    strength = max(abs(low), abs(high))
    return strength, (low / strength, high / strength) if strength else BOTH


class ColorJitter(Operation):
    """Brightness, contrast, saturation, factors 1 ± strength in [0, 1], and hue, ± strength of a circle in [0, 0.5]: in a
    random order, the first three in an order of each example's own. As `v2.ColorJitter`, which it takes over."""

    numbers: Mapping[str, Hyperparameter] = {
        "brightness": Hyperparameter(0.05, 0, 1),
        "contrast": Hyperparameter(0.05, 0, 1),
        "saturation": Hyperparameter(0.05, 0, 1),
        "hue": Hyperparameter(0.05, 0, 0.5),
    }
    defaults: Mapping[str, Any] = dict.fromkeys(numbers, BOTH)

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        pairs = {name: spread(getattr(module, name), float(name != "hue")) for name in cls.numbers}
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

    @staticmethod
    def draw(x: Tensor, *strengths: Tensor | float, **ranges: Range) -> tuple[Tensor, ...]:
        changes = [
            (by_example(strength, x) * uniform(x, *drawn)).flatten()
            for strength, drawn in zip(strengths, ranges.values(), strict=True)
        ]
        factors = (1 + torch.stack(changes[:3], 1)).clamp_min(0)
        order = torch.rand(len(x), 3, device=x.device).argsort(1)
        return factors, changes[3], order, torch.randperm(len(x), device=x.device)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, ...], **ranges: Range) -> Tensor:
        return jitter(x, *drawn)


class Affine(Operation):
    """Rotation and shear ± strength degrees in [0, 45], translation ± strength of the size in [0, 0.5] (whole pixels), scale
    1 ± strength in [0, 0.5]. As `v2.RandomAffine`, which it takes over. mode: "bilinear" or "nearest"; fill: what is
    outside of the image, a tuple of one value or one per channel, None for 0; center: (x, y) in pixels, None for the middle."""

    numbers: Mapping[str, Hyperparameter] = {
        "rotation": Hyperparameter(5, 0, 45),
        "translate": Hyperparameter(0.05, 0, 0.5),
        "scale": Hyperparameter(0.05, 0, 0.5),
        "shear": Hyperparameter(5, 0, 45),
    }
    defaults: Mapping[str, Any] = {
        "rotation": BOTH, "translate": (1.0, 1.0), "scale": BOTH, "shear": (*BOTH, 0.0, 0.0), "mode": "bilinear",
        "fill": None, "center": None,
    }  # fmt: skip
    apply = staticmethod(resample)

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        rotation, scale = spread(module.degrees, 0), spread(module.scale, 1)
        translate = max(module.translate or (0.0,))
        sides = tuple(float(side) / translate for side in module.translate) if translate else (1.0, 1.0)
        shear = [float(angle) for angle in (module.shear or ())]
        most = max(map(abs, shear), default=0.0)
        angles = [angle / most for angle in shear] if most else [*BOTH]
        angles += [0.0] * (4 - len(angles))
        starts = {"rotation": rotation[0], "translate": translate, "scale": scale[0], "shear": most}
        settings = {"rotation": rotation[1], "translate": sides, "scale": scale[1], "shear": tuple(angles)}
        return starts, settings | _sampling(module)

    @staticmethod
    def draw(x: Tensor, *strengths: Tensor | float, **settings: Any) -> Tensor:
        (height, width), (rotation, translate, scale, shear) = x.shape[-2:], strengths

        def each(strength: Any, low: float, high: float) -> Tensor:
            return (by_example(strength, x) * uniform(x, low, high)).flatten()

        sides = zip((width, height), settings["translate"], strict=True)
        moved = torch.stack([(size * each(translate, -side, side)).round() for size, side in sides], 1)
        low_x, high_x, low_y, high_y = settings["shear"]
        sheared = torch.stack([each(shear, low_x, high_x), each(shear, low_y, high_y)], 1)
        scaled = 1 + each(scale, *settings["scale"])
        center = _from_middle(settings["center"], x)
        return inverse_affine(each(rotation, *settings["rotation"]), moved, scaled, sheared, center)


class Rotation(Operation):
    """Rotation by ± strength degrees, in [0, 180]. As `v2.RandomRotation` without expand, which it takes over; settings as
    of `hp.Affine`."""

    numbers: Mapping[str, Hyperparameter] = {"rotation": Hyperparameter(5, 0, 180)}
    defaults: Mapping[str, Any] = {"rotation": BOTH, "mode": "bilinear", "fill": None, "center": None}
    apply = staticmethod(resample)

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        if module.expand:
            raise NotImplementedError("RandomRotation(expand=True), whose images differ in size")
        strength, drawn = spread(module.degrees, 0)
        return {"rotation": strength}, {"rotation": drawn} | _sampling(module)

    @staticmethod
    def draw(x: Tensor, *strengths: Tensor | float, **settings: Any) -> Tensor:
        angle = (
            -by_example(strengths[0], x) * uniform(x, *settings["rotation"])
        ).flatten()  # v2 turns the other way here
        none = angle.new_zeros(len(angle), 2)
        return inverse_affine(angle, none, torch.ones_like(angle), none, _from_middle(settings["center"], x))


def _sampling(module: Any) -> dict[str, Any]:
    """mode, fill and center of a module of torchvision's."""
    fill = module.fill
    if isinstance(fill, Mapping):
        raise NotImplementedError(f"{type(module).__name__} with a fill per type of input")
    filled = tuple(map(float, fill)) if isinstance(fill, (list, tuple)) else (float(fill or 0),)
    mode = module.interpolation.value if hasattr(module.interpolation, "value") else str(module.interpolation)
    return {"mode": mode, "fill": filled, "center": tuple(module.center) if module.center is not None else None}


def _from_middle(center: tuple[float, float] | None, x: Tensor) -> tuple[float, float]:
    if center is None:
        return 0.0, 0.0
    return center[0] - x.shape[-1] / 2, center[1] - x.shape[-2] / 2


class Cutout(Operation):
    """`holes`, 0 to 5, squares of side `length`, 2 to 24 pixels, at random places set to 0 (DeVries & Taylor 2017, arXiv
    1708.04552); both are whole numbers."""

    numbers: Mapping[str, Hyperparameter] = {
        "holes": Hyperparameter(1, 0, 5, integer=True),
        "length": Hyperparameter(4, 2, 24, integer=True),
    }
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, holes: Tensor | float, length: Tensor | float) -> Tensor:
        return (~cutout_mask(x, by_example(holes, x), by_example(length, x), most=5)).to(x.dtype)


class Erasing(Operation):
    """Probability, in [0, 1], of erasing one box (Zhong et al. 2020, arXiv 1708.04896). As `v2.RandomErasing`, which it takes
    over. scale: range of the box's share of the area; ratio: of its height to its width; value: what is put there, one
    number or one per channel; None: normal noise."""

    numbers: Mapping[str, Hyperparameter] = {"erasing": Hyperparameter(0.05, 0, 1)}
    defaults: Mapping[str, Any] = {"scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": (0.0,)}

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        value = None if module.value is None else tuple(map(float, module.value))
        settings = {"scale": tuple(map(float, module.scale)), "ratio": tuple(map(float, module.ratio)), "value": value}
        return {"erasing": module.p}, settings

    @staticmethod
    def draw(x: Tensor, erasing: Tensor | float, **settings: Any) -> tuple[Tensor, Tensor]:
        value = settings["value"]
        noise = (
            torch.randn_like(as_float(x)) if value is None else torch.tensor(value, device=x.device).view(1, -1, 1, 1)
        )
        return erasing_mask(x, by_example(erasing, x), settings["scale"], settings["ratio"]), noise.to(x.dtype)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, Tensor], **settings: Any) -> Tensor:
        return torch.where(drawn[0], drawn[1], x)


class _Chosen(Operation):
    """Something done to an example with a tuned probability, a module's `p`."""

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        return dict.fromkeys(cls.numbers, module.p), {}

    @staticmethod
    def draw(x: Tensor, probability: Tensor | float) -> Tensor:
        return uniform(x) < by_example(probability, x)


class Flip(_Chosen):
    """Probability, in [0, 1], of a mirror image, left to right. Takes over `v2.RandomHorizontalFlip`."""

    numbers: Mapping[str, Hyperparameter] = {"flip": Hyperparameter(0.05, 0, 1)}

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, x.flip(-1), x)


class VerticalFlip(_Chosen):
    """Probability, in [0, 1], of a mirror image, top to bottom. Takes over `v2.RandomVerticalFlip`."""

    numbers: Mapping[str, Hyperparameter] = {"vertical_flip": Hyperparameter(0.05, 0, 1)}

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, x.flip(-2), x)


class Grayscale(_Chosen):
    """Probability, in [0, 1], of a grey image. Takes over `v2.RandomGrayscale`."""

    numbers: Mapping[str, Hyperparameter] = {"grayscale": Hyperparameter(0.05, 0, 1)}

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, like_before(gray(as_float(x)), x), x)


class GaussianNoise(Operation):
    """Standard deviation of noise, in [0, 0.5]. Takes over `v2.GaussianNoise`. clip: keep values in [0, 1]."""

    numbers: Mapping[str, Hyperparameter] = {"sigma": Hyperparameter(0.05, 0, 0.5)}
    defaults: Mapping[str, Any] = {"mean": 0.0, "clip": True}

    @staticmethod
    def draw(x: Tensor, sigma: Tensor | float, **settings: Any) -> Tensor:
        return settings["mean"] + by_example(sigma, x) * torch.randn_like(as_float(x))

    @staticmethod
    def apply(x: Tensor, drawn: Tensor, **settings: Any) -> Tensor:
        noisy = as_float(x) + drawn
        noisy = noisy.clamp(0, 1) if settings["clip"] else noisy
        return torch.where(drawn == 0, x, like_before(noisy, x))


class GaussianBlur(Operation):
    """Standard deviation of a blur, drawn from up to the strength, in [0, 5] pixels. Takes over `v2.GaussianBlur`.

    kernel_size: (width, height), odd. shares: the range of the draw, in shares of the strength."""

    numbers: Mapping[str, Hyperparameter] = {"blur": Hyperparameter(0.5, 0, 5)}
    defaults: Mapping[str, Any] = {"kernel_size": (5, 5), "shares": (0.0, 1.0)}

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        low, high = map(float, module.sigma)
        return {"blur": high}, {"kernel_size": tuple(module.kernel_size), "shares": (low / high, 1.0)}

    @staticmethod
    def draw(x: Tensor, blur: Tensor | float, **settings: Any) -> tuple[Tensor, ...]:
        sigma = (by_example(blur, x) * uniform(x, *settings["shares"])).view(-1, 1)
        kernels = []
        for size in settings["kernel_size"]:
            steps = torch.arange(size, device=x.device, dtype=sigma.dtype) - size // 2
            kernels.append(torch.softmax(-0.5 * (steps / sigma.clamp_min(1e-6)).square(), 1))
        return tuple(kernels)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, ...], **settings: Any) -> Tensor:
        images, (batch, channels, height, width) = as_float(x), x.shape
        across, down = (kernel.to(images.dtype).repeat_interleave(channels, 0) for kernel in drawn)
        w, h = settings["kernel_size"]
        y = F.pad(images, (w // 2, w // 2, h // 2, h // 2), mode="reflect").flatten(0, 1)[None]
        y = F.conv2d(y, across[:, None, None], groups=batch * channels)
        y = F.conv2d(y, down[:, None, :, None], groups=batch * channels)
        return like_before(y[0].view(batch, channels, height, width), x)
