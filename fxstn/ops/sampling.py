"""Sampling an image at fractional positions: the tangent in the positions of F.grid_sample."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.linear_maps import linear_map

_MODES, _PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


def _reflected(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(position, slope) of x reflected into [low, high]."""
    span = high - low
    if span <= 0:
        return torch.zeros_like(x), torch.zeros_like(x)
    distance = (x - low).abs()
    turns, rest = torch.div(distance, span, rounding_mode="floor"), distance % span
    backwards = turns % 2 == 1
    slope = torch.where(backwards, -1.0, 1.0) * torch.where(x < low, -1.0, 1.0)
    return torch.where(backwards, high - rest, low + rest), slope.to(x.dtype)


def _inside(x: Tensor, size: int, padding: str, aligned: bool) -> tuple[Tensor, Tensor]:
    """(position, slope) of pixel coordinates after border or reflection padding; as they are for zeros."""
    slope = torch.ones_like(x)
    if padding == "reflection":
        x, slope = _reflected(x, 0.0, size - 1.0) if aligned else _reflected(x, -0.5, size - 0.5)
    if padding != "zeros":
        slope = torch.where((x <= 0) | (x >= size - 1), 0, slope)
        x = x.clamp(0, size - 1)
    return x, slope


def _cubic(t: Tensor, a: float = -0.75) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of the taps -1, 0, 1, 2 around floor(x) + t, and their derivatives in t (Keys 1981)."""
    near = [(((a + 2) * s - (a + 3)) * s * s + 1, (3 * (a + 2) * s - 2 * (a + 3)) * s) for s in (t, 1 - t)]
    far = [(((a * s - 5 * a) * s + 8 * a) * s - 4 * a, (3 * a * s - 10 * a) * s + 8 * a) for s in (1 + t, 2 - t)]
    weights = [far[0][0], near[0][0], near[1][0], far[1][0]]
    return weights, [far[0][1], near[0][1], -near[1][1], -far[1][1]]


def _taps(x: Tensor, size: int, cubic: bool, padding: str, aligned: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """[(index, weight, derivative of the weight in the normalised coordinate)] along one axis; x in [-1, 1]."""
    position = ((x + 1) * (size - 1) if aligned else (x + 1) * size - 1) / 2
    slope = (size - 1 if aligned else size) / 2 * torch.ones_like(x)
    if not cubic:
        position, inner = _inside(position, size, padding, aligned)
        slope = slope * inner
    base = position.floor()
    t = position - base
    weights, changes = _cubic(t) if cubic else ([1 - t, t], [-torch.ones_like(t), torch.ones_like(t)])
    taps = []
    for i, (weight, change) in enumerate(zip(weights, changes, strict=True)):
        index = base + (i - 1 if cubic else i)
        if cubic:
            index = _inside(index, size, padding, aligned)[0]
        within = (index >= 0) & (index <= size - 1)
        taps.append((index.clamp(0, size - 1).long(), weight * within, change * slope * within))
    return taps


def _grid_transpose(cotangent: Tensor, image: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> Tensor:
    spatial = image.dim() - 2
    backward = getattr(torch.ops.aten, f"grid_sampler_{spatial}d_backward")
    return backward(cotangent, image, grid, mode, padding, aligned, [False, True])[1]


@linear_map(_grid_transpose)
def _grid_tangent(tangent: Tensor, image: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> Tensor:
    sizes = image.shape[:1:-1]  # of x, y, z: the grid's last dimension counts the axes backwards
    axes = [
        _taps(grid[..., i], size, _MODES[mode] == "bicubic", _PADDINGS[padding], aligned)
        for i, size in enumerate(sizes)
    ]
    pixels = image.flatten(2)
    result = torch.zeros_like(pixels[:, :, :1])
    for taps in itertools.product(*axes):
        index, factor = torch.zeros_like(taps[0][0]), torch.zeros_like(taps[0][1])
        for i in reversed(range(len(taps))):
            index = index * sizes[i] + taps[i][0]
            others = [weight for j, (_, weight, _) in enumerate(taps) if j != i]
            factor = factor + math.prod(others, start=tangent[..., i] * taps[i][2])
        values = pixels.gather(2, index.flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1))
        result = result + values * factor.flatten(1).unsqueeze(1)
    return result.view(*image.shape[:2], *grid.shape[1:-1])


@staged
def grid_tangent(
    tangent: Tensor, image: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    """Tangent of F.grid_sample(image, grid) in the grid.

    Each tap's weight is differentiated; at a kink (a position on a pixel) as torch's backward has it, which is its gradient.

    tangent, grid: (batch, *sizes of the result, 2 or 3).
    image: (batch, channels, ...), with 2 or 3 spatial dimensions.
    mode, padding_mode, align_corners: as for F.grid_sample.

    Returns (batch, channels, *sizes of the result).
    """
    return _grid_tangent(tangent, image, grid, _MODES.index(mode), _PADDINGS.index(padding_mode), bool(align_corners))
