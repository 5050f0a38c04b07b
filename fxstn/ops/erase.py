"""Erased boxes of batches of images (batch, channels, H, W), each example with its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ops.noise import uniform


def boxes_mask(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Where boxes cover an image; they are cut at its borders.

    top, left, height, width: (batch, boxes) each, pixels.
    size: (H, W).

    Returns bool (batch, 1, H, W).
    """
    sides = []
    for start, length, total in ((top, height, size[0]), (left, width, size[1])):
        position = torch.arange(total, device=start.device)
        sides.append(((position >= start[..., None]) & (position < (start + length)[..., None])).float())
    rows, columns = sides
    return (rows.mT @ columns > 0)[:, None]  # in how many boxes each pixel is


def over_frames(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (batch, 1, H, W) for images x, or for clips (batch, channels, T, H, W), whose frames share it."""
    return mask if x.dim() == 4 else mask.unsqueeze(2)


def cutout_mask(x: Tensor, holes: Tensor, length: Tensor, most: int) -> Tensor:
    """Squares at uniformly drawn pixels, cut at the borders (DeVries & Taylor 2017).

    x: (batch, channels, H, W).
    holes, length: (batch or 1, 1, 1, 1), whole numbers: of squares, and their side in pixels.
    most: the largest number of holes.

    Returns bool (batch, 1, H, W).
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
    """One box with probability p (Zhong et al. 2020).

    x: (batch, channels, H, W).
    p: (batch or 1, 1, 1, 1).
    scale: range of the box's share of the area, which is uniform.
    ratio: range of its height over its width, which is log-uniform.
    tries: draws of a box. The first that fits into the image is used, and none when none does.

    Returns bool (batch, 1, H, W).
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
