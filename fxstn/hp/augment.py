"""Augmentations of images (batch, channels, H, W) inside the graph, on their device, each example at its own strength.

All frames of a clip (batch, channels, T, H, W) share a draw; noise is drawn for each.

Images are uint8, or floating point in [0, 1]; `v2.Normalize` belongs into the model, after the augmentations. A strength bounds
a uniform draw. At strength 0 images stay as they are, bit for bit. Augmentations act in train mode only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxstn.hp.checks import FILL, FLAG, NUMBER, ODD_SIDES, Check, span
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation, Settings, Strength, WithProbability
from fxstn.ops.color import as_float, gray, jitter, like_before
from fxstn.ops.constants import per_channel
from fxstn.ops.erase import cutout_mask, erasing_mask, over_frames
from fxstn.ops.noise import by_example, uniform
from fxstn.ops.precision import without_autocast

if TYPE_CHECKING:
    from torchvision.transforms import v2

Range = tuple[float, float]
Fill = tuple[float, ...] | None
BOTH: Range = (-1.0, 1.0)
SHARES = span(-1, 1)  # a range, in shares of the strength


def spread(ends: Range | None, neutral: float) -> tuple[float, Range]:
    """A range around a neutral value as (strength, range of the draw): a value is neutral + strength · draw."""
    if ends is None:
        return 0.0, BOTH
    low, high = (float(end) - neutral for end in ends)
    strength = max(abs(low), abs(high))
    return strength, (low / strength, high / strength) if strength else BOTH


class ColorJitter(Operation):
    """Brightness, contrast, saturation, by factors 1 ± strength in [0, 1], and hue, by ± strength of a circle in [0, 0.5].

    They act in a random order, the first three in an order of each example's own. As `v2.ColorJitter`, which it takes over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {
        "brightness": Hyperparameter(0.4, 0, 1),
        "contrast": Hyperparameter(0.4, 0, 1),
        "saturation": Hyperparameter(0.4, 0, 1),
        "hue": Hyperparameter(0.1, 0, 0.5),
    }
    defaults: Mapping[str, object] = dict.fromkeys(numbers, BOTH)
    checks: Mapping[str, Check] = dict.fromkeys(numbers, SHARES)
    images = True

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        pairs = {name: spread(getattr(module, name), float(name != "hue")) for name in cls.numbers}
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

    @staticmethod
    def draw(x: Tensor, *strengths: Strength, **ranges: Range) -> tuple[Tensor, ...]:
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


class Cutout(Operation):
    """`holes`, 0 to 5, squares of side `length`, 2 to 24 pixels, at random places become 0 (DeVries & Taylor 2017, arXiv
    1708.04552). Both are whole numbers.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {
        "holes": Hyperparameter(1, 0, 5, integer=True),
        "length": Hyperparameter(8, 2, 24, integer=True),
    }
    images = True
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, holes: Strength, length: Strength) -> Tensor:
        mask = cutout_mask(x, by_example(holes, x), by_example(length, x), most=5)
        return over_frames(~mask, x).to(x.dtype)


class Erasing(Operation):
    """Probability, in [0, 1], of erasing one box (Zhong et al. 2020, arXiv 1708.04896). As `v2.RandomErasing`, which it takes
    over.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    area: range of the box's share of the area, v2's `scale`.
    ratio: range of its height to its width.
    value: what fills the box: a tuple of one number, or of one per channel. None: normal noise.
    """

    numbers: Mapping[str, Hyperparameter] = {"erasing": Hyperparameter(0.1, 0, 1)}
    defaults: Mapping[str, object] = {"area": (0.02, 0.33), "ratio": (0.3, 3.3), "value": (0.0,)}
    checks: Mapping[str, Check] = {
        "area": span(0, 1, positive=True),
        "ratio": span(0, math.inf, positive=True),
        "value": FILL,
    }
    images = True

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        own = cast("v2.RandomErasing", module)
        value = None if own.value is None else tuple(map(float, own.value))
        settings = {"area": tuple(map(float, own.scale)), "ratio": tuple(map(float, own.ratio)), "value": value}
        return {"erasing": own.p}, settings

    @staticmethod
    def draw(x: Tensor, erasing: Strength, *, area: Range, ratio: Range, value: Fill) -> tuple[Tensor, Tensor]:
        image = x if x.dim() == 4 else x[:, :, 0]  # frames share what is erased, and by what
        noise = torch.randn_like(as_float(image)) if value is None else per_channel(value, as_float(image))
        mask = erasing_mask(image, by_example(erasing, image), area, ratio)
        return over_frames(mask, x), over_frames(noise.to(x.dtype), x)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, Tensor], **settings: object) -> Tensor:
        mask, noise = drawn
        return torch.where(mask, noise, x)


class ByChance(Operation):
    """Base of what happens to an example with a tuned probability, a module's `p`."""

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        return dict.fromkeys(cls.numbers, cast(WithProbability, module).p), {}

    @staticmethod
    def draw(x: Tensor, probability: Strength) -> Tensor:
        return uniform(x) < by_example(probability, x)


class Grayscale(ByChance):
    """Probability, in [0, 1], of a grey image. Takes over `v2.RandomGrayscale`.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"grayscale": Hyperparameter(0.1, 0, 1)}
    images = True

    @staticmethod
    def apply(x: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn, like_before(gray(as_float(x)), x), x)


class GaussianNoise(Operation):
    """Standard deviation of noise, in [0, 0.5]. Takes over `v2.GaussianNoise`.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    mean: of the noise.
    clip: values stay in [0, 1].
    """

    numbers: Mapping[str, Hyperparameter] = {"sigma": Hyperparameter(0.1, 0, 0.5)}
    defaults: Mapping[str, object] = {"mean": 0.0, "clip": True}
    checks: Mapping[str, Check] = {"mean": NUMBER, "clip": FLAG}

    @staticmethod
    def draw(x: Tensor, sigma: Strength, *, mean: float, clip: bool) -> Tensor:
        return mean + by_example(sigma, x) * torch.randn_like(as_float(x))

    @staticmethod
    def apply(x: Tensor, drawn: Tensor, *, mean: float, clip: bool) -> Tensor:
        noisy = as_float(x) + drawn
        return torch.where(drawn == 0, x, like_before(noisy.clamp(0, 1) if clip else noisy, x))


class GaussianBlur(Operation):
    """Largest standard deviation of a blur, in [0, 5] pixels. Takes over `v2.GaussianBlur`.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    kernel_size: (width, height), odd.
    shares: the range that the standard deviation is drawn from, in shares of the largest.
    """

    numbers: Mapping[str, Hyperparameter] = {"blur": Hyperparameter(1.0, 0, 5)}
    defaults: Mapping[str, object] = {"kernel_size": (5, 5), "shares": (0.0, 1.0)}
    checks: Mapping[str, Check] = {"kernel_size": ODD_SIDES, "shares": span(0, 1)}
    images = True

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        own = cast("v2.GaussianBlur", module)
        low, high = map(float, own.sigma)
        return {"blur": high}, {"kernel_size": tuple(own.kernel_size), "shares": (low / high, 1.0)}

    @staticmethod
    def draw(x: Tensor, blur: Strength, *, kernel_size: tuple[int, int], shares: Range) -> tuple[Tensor, ...]:
        if min(x.shape[-2:]) <= (reach := max(kernel_size) // 2):
            raise ValueError(f"hp.GaussianBlur: kernel_size={kernel_size} needs images of more than {reach} pixels along each "
                             f"side, and got {tuple(x.shape)}; give a smaller one")  # fmt: skip
        sigma = (by_example(blur, x) * uniform(x, *shares)).view(-1, 1)
        kernels = []
        for size in kernel_size:
            steps = torch.arange(size, device=x.device, dtype=sigma.dtype) - size // 2
            kernels.append(torch.softmax(-0.5 * (steps / sigma.clamp_min(1e-6)).square(), 1))
        return tuple(kernels)

    @staticmethod
    def apply(x: Tensor, drawn: tuple[Tensor, ...], *, kernel_size: tuple[int, int], shares: Range) -> Tensor:
        images = as_float(x).flatten(1, -3)
        batch, channels = images.shape[:2]
        across, down = (kernel.to(images.dtype).repeat_interleave(channels, 0) for kernel in drawn)
        w, h = kernel_size
        y = F.pad(images, (w // 2, w // 2, h // 2, h // 2), mode="reflect").flatten(0, 1)[None]
        with without_autocast(x.device.type):
            y = F.conv2d(y, across[:, None, None], groups=batch * channels)
            y = F.conv2d(y, down[:, None, :, None], groups=batch * channels)
        return like_before(y[0].view(x.shape), x)
