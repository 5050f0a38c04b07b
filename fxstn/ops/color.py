"""Colour operations on batches of images (batch, channels, H, W), each example at its own strength.

Values are in [0, 1] for floating point images and 0 to 255 for uint8; with one channel saturation and hue do nothing. The
formulas are torchvision's (`torchvision.transforms.v2.functional`), which takes them from PIL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from fxstn.ir.staging import staged
from fxstn.ops.constants import constant
from fxstn.ops.precision import widen


def as_float(x: Tensor) -> Tensor:
    """Images with values in [0, 1], at least float32. Raises TypeError for other types than uint8 and floating point."""
    if x.is_floating_point():
        return widen(x)
    if x.dtype != torch.uint8:
        raise TypeError(f"images are floating point in [0, 1] or uint8, got {x.dtype}")
    return x.float() / 255


def like_before(y: Tensor, x: Tensor) -> Tensor:
    """y, computed from as_float(x), in the type of x."""
    return y.to(x.dtype) if x.is_floating_point() else (y * 255).round().clamp(0, 255).to(x.dtype)


def check_channels(x: Tensor) -> None:
    """Raises ValueError for images of other numbers of channels than 1 and 3."""
    if x.shape[1] not in (1, 3):
        raise ValueError(
            f"colour operations need images of 1 or 3 channels, (batch, channels, H, W); got {tuple(x.shape)}"
        )


def gray(x: Tensor) -> Tensor:
    """Luma (batch, 1, H, W) of RGB images by ITU-R 601; x itself with one channel. Raises ValueError for other numbers."""
    check_channels(x)
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, 1)
    return torch.add(0.2989 * r, g, alpha=0.587).add_(b, alpha=0.114)


def shift_hue(x: Tensor, shift: Tensor, ramps: tuple[Tensor, ...] | None = None) -> Tensor:
    """RGB images with their hue turned by `shift` of a full circle, (batch, 1, 1, 1), in [-0.5, 0.5].

    With the smallest channel m, chroma C and hue H in sixths, red is m + C · clip(|H − 3| − 1, 0, 1), green and blue
    m + C · clip(2 − |H − k|, 0, 1) with k = 2 and 4.

    ramps: of `ramps_of_channels`, for several calls.
    """
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    hue = torch.lerp((b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4), _apart(value, g))
    hue = torch.lerp(g - b, hue, _apart(value, r)) / chroma.clamp_min(1e-30)  # 0 without chroma
    hue.add_(6 * shift)
    hue = hue.sub(torch.floor(hue / 6), alpha=6)
    middle, sign, top = ramps_of_channels(x) if ramps is None else ramps
    shares = torch.addcmul(top, (hue - middle).abs_(), sign).clamp_(0, 1)
    return torch.addcmul(low, chroma, shares)


def ramps_of_channels(x: Tensor) -> tuple[Tensor, ...]:
    """(k, s, t) of `shift_hue`, (1, 3, 1, 1): a channel has s |H − k| + t of the chroma, cut to [0, 1]."""
    return tuple(constant(values, x).view(1, 3, 1, 1) for values in ((3, 2, 4), (1, -1, -1), (-1, 2, 2)))


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b and 0 where they are equal, several times as fast as comparing and torch.where on a CPU."""
    return ((a - b).detach() * 1e30).clamp_(max=1)


def jitter(x: Tensor, factors: Tensor, shift: Tensor, order: Tensor, arrangement: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each example, in an order of its own.

    x: (batch, channels, H, W), or clips (batch, channels, T, H, W), all of whose frames change alike.
    factors: (batch, 3), ≥ 0, of the first three.
    shift: (batch,), of the hue.
    order: (batch, 3), the order of the first three.
    arrangement: (batch,), a permutation of the batch, whose quarters have the hue first, second, third, last.

    All three blend with a grey image: black, the mean luma, or the luma of each pixel. So one blend whose weights depend on
    the example does each of them, and the hue of each example is turned once.
    """
    check_channels(x)
    images = as_float(x)
    result, ramps = torch.empty_like(images), ramps_of_channels(images)
    factor = factors.gather(1, order)
    of_mean, of_luma = ((1 - factor) * (order == kind) for kind in (1, 2))
    unchanged = ((factors == 1).all(1) & (shift == 0)).to(images.dtype)
    columns = torch.cat([factor, of_mean, of_luma, shift[:, None], unchanged[:, None]], 1)[arrangement]
    frames = x.shape[2] if x.dim() == 5 else 1
    for quarter, (rows, own) in enumerate(zip(arrangement.tensor_split(4), columns.tensor_split(4), strict=True)):
        own = own.repeat_interleave(frames, 0) if frames > 1 else own
        *blends, turn, still = own[:, :, None, None, None].unbind(1)
        chosen = images.index_select(0, rows)
        before = y = chosen if x.dim() == 4 else chosen.movedim(2, 1).flatten(0, 1)
        for step in range(4):
            y = shift_hue(y, turn, ramps) if step == quarter else y
            y = _blend(y, *blends[step::3]) if step < 3 else y
        y = torch.lerp(y, before, still)
        result.index_copy_(0, rows, y if x.dim() == 4 else y.unflatten(0, (-1, frames)).movedim(1, 2))
    return like_before(result, x)


def _blend(y: Tensor, factor: Tensor, of_mean: Tensor, of_luma: Tensor) -> Tensor:
    """factor · y + of_luma · (luma of each pixel) + of_mean · (mean luma), cut to [0, 1].

    y: (batch, channels, H, W).
    factor, of_mean, of_luma: (batch, 1, 1, 1).
    """
    luma = gray(y)
    other = torch.addcmul(luma.mean((1, 2, 3), keepdim=True) * of_mean, luma, of_luma)
    return torch.addcmul(other, y, factor).clamp_(0, 1)


@staged
def normalize_channels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std per channel, dimension -3, of floating point images."""
    mean_, std_ = (constant(values, x).view(-1, 1, 1) for values in (mean, std))
    return (x - mean_) / std_


@staged
def convert(x: Tensor, dtype: torch.dtype | None, scale: bool) -> Tensor:
    """Another type, and with `scale` its range of values, [0, 1] or 0 to 255: `v2.functional.to_dtype`."""
    return to_dtype(x, dtype or x.dtype, scale)
