"""Averages over regions of an image (RoIAlign, He et al. 2017): their tangent in the positions of the regions."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.constants import constant


def _edges(boxes: Tensor, scale: float, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(start, size, whether the size follows the box) of the regions in pixels, each (regions, 2), x first."""
    start, end = (boxes[:, 1:3] * scale, boxes[:, 3:5] * scale)
    size = end - start
    if aligned:
        return start - 0.5, size, torch.ones_like(size)
    return start, size.clamp(min=1), (size > 1).to(size.dtype)


def _corners(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lower pixel, upper pixel, weight of the upper, whether the sample counts, whether it moves) along one axis."""
    counts = (position >= -1) & (position <= length)
    inner = position.clamp(min=0)
    low = inner.floor().long().clamp(max=length - 1)
    last = low >= length - 1
    weight = torch.where(last, 0, inner - low)
    return low, (low + 1).clamp(max=length - 1), weight, counts, counts & (position > 0) & ~last


def _slopes(image: Tensor, batch: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives in y and in x of the image at positions y (regions, m) and x (regions, n): (regions, m, n, channels)."""
    (top, bottom, v, counts_y, moves_y), (left, right, u, counts_x, moves_x) = (
        _corners(y, image.shape[2]),
        _corners(x, image.shape[3]),
    )

    def at(row: Tensor, column: Tensor) -> Tensor:
        return image[batch[:, None, None], :, row[:, :, None], column[:, None, :]]

    v, u = v[:, :, None, None], u[:, None, :, None]
    in_y = (1 - u) * (at(bottom, left) - at(top, left)) + u * (at(bottom, right) - at(top, right))
    in_x = (1 - v) * (at(top, right) - at(top, left)) + v * (at(bottom, right) - at(bottom, left))
    in_y = in_y * (moves_y[:, :, None, None] & counts_x[:, None, :, None])
    return in_y, in_x * (counts_y[:, :, None, None] & moves_x[:, None, :, None])


@staged
def region_shift(
    tangent: Tensor, image: Tensor, boxes: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> Tensor:
    """Tangent of torchvision's roi_align in the boxes.

    tangent, boxes: (regions, 5), the image's number first, then x1, y1, x2, y2.
    image: (batch, channels, H, W).
    scale: pixels of the image per unit of the boxes.
    height, width: bins of each region.
    ratio: samples per bin and axis; as many as the bin has pixels for ratio ≤ 0.
    aligned: whether pixels are at half-integers.

    Returns (regions, channels, height, width).
    """
    start, size, follows = _edges(boxes, scale, aligned)
    moved = tangent[:, 1:3] * scale
    stretched = (tangent[:, 3:5] - tangent[:, 1:3]) * scale * follows
    bins = constant((width, height), boxes)
    samples = torch.full_like(size, ratio) if ratio > 0 else (size / bins).ceil()
    result = tangent.new_zeros(len(boxes), image.shape[1], height, width)
    for numbers in samples.unique(dim=0):
        chosen = (samples == numbers).all(1).nonzero()[:, 0]
        if numbers.min() < 1:
            continue
        positions, inside = [], []
        for axis, count in ((1, height), (0, width)):
            n = int(numbers[axis])
            within = torch.arange(count * n, device=boxes.device, dtype=boxes.dtype).add(0.5) / (n * count)
            inside.append((within, n))
            positions.append(start[chosen, axis, None] + size[chosen, axis, None] * within)
        in_y, in_x = _slopes(image, boxes[chosen, 0].long(), positions[0], positions[1])
        (rows, m), (columns, n) = inside
        dy = moved[chosen, 1, None] + stretched[chosen, 1, None] * rows
        dx = moved[chosen, 0, None] + stretched[chosen, 0, None] * columns
        change = in_y * dy[:, :, None, None] + in_x * dx[:, None, :, None]
        averages = change.unflatten(2, (width, n)).unflatten(1, (height, m)).mean((2, 4))
        result = result.index_copy(0, chosen, averages.permute(0, 3, 1, 2).to(result.dtype))
    return result
