"""Erased boxes of batches of images (batch, channels, H, W), each example with its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ops.noise import uniform


def boxes_mask(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Where boxes cover an image: (batch, boxes) each, in pixels, cut at the borders → bool (batch, 1, H, W)."""
    covered = []
    for start, length, total in ((top, height, size[0]), (left, width, size[1])):
        position = torch.arange(total, device=start.device)
        covered.append(((position >= start[..., None]) & (position < (start + length)[..., None])).float())
    rows, columns = covered
    return (rows.mT @ columns > 0)[:, None]  # in how many boxes each pixel is


def cutout_mask(x: Tensor, holes: Tensor, length: Tensor, most: int) -> Tensor:
    """Squares at uniformly drawn pixels, cut at the borders (DeVries & Taylor 2017): bool (batch, 1, H, W).

    holes, length: (batch or 1, 1, 1, 1), whole numbers; most: the largest number of holes.
    """
    batch, size = x.shape[0], x.shape[-2:]
    length = length.view(-1, 1)
    top, left = (
        (torch.rand(batch, most, device=x.device) * total).floor() - torch.div(length, 2, rounding_mode="floor")
        for total in size
    )
    length = torch.where(torch.arange(most, device=x.device) < holes.view(-1, 1), length, 0)
    return boxes_mask(top, left, length, length, (size[0], size[1]))


def erasing_mask(
    x: Tensor, p: Tensor, scale: tuple[float, float], ratio: tuple[float, float], tries: int = 10
) -> Tensor:
    """One box with probability p (Zhong et al. 2020): bool (batch, 1, H, W).

    Its share of the area is uniform in `scale`, its ratio of height to width log-uniform in `ratio`; the first of `tries`
    draws that fits is taken, and none when none does. p: (batch or 1, 1, 1, 1).
    """
    batch, (height, width) = x.shape[0], x.shape[-2:]
    area, logarithm, row, column = torch.rand(4, batch, tries, device=x.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = (float(torch.tensor(end, dtype=torch.float64).log()) for end in ratio)
    aspect = (low + (high - low) * logarithm).exp()
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits & (fits.cumsum(1) == 1)
    top, left = (row * (height - tall + 1)).floor(), (column * (width - wide + 1)).floor()
    box = boxes_mask(top, left, torch.where(first, tall, 0), wide, (height, width))
    return box & (uniform(x) < p)
