"""Colour operations on batches of images (batch, channels, H, W), each example at its own strength.

Values are in [0, 1] for floating point images and 0 to 255 for uint8; with one channel saturation and hue do nothing. The
formulas are torchvision's (`torchvision.transforms.v2.functional`), which takes them from PIL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from fxstn.staging import staged


def as_float(x: Tensor) -> Tensor:
    """Images with values in [0, 1]. Raises TypeError for other types than uint8 and floating point."""
    if x.is_floating_point():
        return x
    if x.dtype != torch.uint8:
        raise TypeError(f"images are floating point in [0, 1] or uint8, got {x.dtype}")
    return x.float() / 255


def like_before(y: Tensor, x: Tensor) -> Tensor:
    """y, computed from as_float(x), in the type of x."""
    return y.to(x.dtype) if x.is_floating_point() else (y * 255).round().clamp(0, 255).to(x.dtype)


def gray(x: Tensor) -> Tensor:
    """Luma (batch, 1, H, W) of RGB images by ITU-R 601; x itself with one channel. Raises ValueError for other numbers."""
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise ValueError(
            f"colour operations need images of 1 or 3 channels, (batch, channels, H, W); got {tuple(x.shape)}"
        )
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """factor · x + (1 − factor) · other, in [0, 1]; x itself where factor is 1. factor: (batch, 1, 1, 1)."""
    return torch.where(factor == 1, x, (factor * x + (1 - factor) * other).clamp(0, 1))


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB images with their hue turned by `shift` of a full circle, (batch, 1, 1, 1), in [-0.5, 0.5].

    With value V, chroma C and hue H in sixths, channel n is V − C · clip(min(k, 4 − k), 0, 1) at k = (n + H) mod 6, n = 5,
    3, 1 for red, green, blue.
    """
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = torch.where(chroma == 0, 1, chroma)
    of_green_blue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(value == r, (g - b) / safe, of_green_blue)
    start = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = torch.remainder(start + hue + 6 * shift, 6)
    turned = value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    return torch.where(shift == 0, x, turned)


def jitter(x: Tensor, factors: Tensor, shift: Tensor, order: Tensor, arrangement: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each example, in an order of its own.

    factors: (batch, 3), ≥ 0, of the first three; shift: (batch,), of the hue. order: (batch, 3), the order of the first three.
    arrangement: a permutation of the batch, whose quarters have the hue first, second, third, last.

    All three blend with a grey image: black, the mean luma, or the luma of each pixel. So one blend whose weights depend on
    the example does each of them, and no example is computed four times.
    """
    images, factors, shift, order = (value[arrangement] for value in (as_float(x), factors, shift, order))
    in_order = factors.gather(1, order)
    parts = []
    whole = images.shape[0]
    for hue_at, part in enumerate(torch.arange(whole, device=x.device).tensor_split(4)):
        y = images[part]
        for place in range(4):
            if place == hue_at:
                y = shift_hue(y, shift[part].view(-1, 1, 1, 1))
            else:
                y = _blend_at(y, in_order[part], order[part], place - (place > hue_at))
        parts.append(y)
    back = torch.empty_like(arrangement).scatter_(0, arrangement, torch.arange(whole, device=x.device))
    return like_before(torch.cat(parts)[back], x)


def _blend_at(y: Tensor, factors: Tensor, order: Tensor, place: int) -> Tensor:
    """The blend that each example has at this place of its order: 0 brightness, 1 contrast, 2 saturation."""
    which, factor = order[:, place].view(-1, 1, 1, 1), factors[:, place].view(-1, 1, 1, 1)
    luma = gray(y)
    other = torch.where(which == 2, luma, torch.where(which == 1, luma.mean((1, 2, 3), keepdim=True), 0))
    return blend(y, other, factor)


@staged
def normalize_channels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std per channel, dimension -3, of floating point images."""
    mean_, std_ = (torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1) for values in (mean, std))
    return (x - mean_) / std_


@staged
def convert(x: Tensor, dtype: torch.dtype | None, scale: bool) -> Tensor:
    """Another type, and with `scale` its range of values, [0, 1] or 0 to 255: `v2.functional.to_dtype`."""
    return to_dtype(x, dtype or x.dtype, scale)
