"""Affine maps of batches of images (batch, channels, H, W), each example with its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.constants import constant, per_channel
from fxstn.ops.precision import widen, without_autocast


def inverse_affine(
    angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor, center: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Matrices that map a pixel of the result to its source, in pixels from the middle of the image.

    As `torchvision.transforms.v2.functional.affine`: R(angle) · scale · shear_y · shear_x.

    angle: (batch,), degrees, clockwise.
    translate: (batch, 2), pixels.
    scale: (batch,), above 0.
    shear: (batch, 2), degrees.
    center: (x, y) that stays in its place, in pixels from the middle.

    Returns (batch, 2, 3).
    """
    angle, shear = torch.deg2rad(angle), torch.deg2rad(shear)
    shear_x, shear_y = shear.unbind(-1)
    a, c = (f(angle - shear_y) / torch.cos(shear_y) for f in (torch.cos, torch.sin))
    b = -(a * torch.tan(shear_x) + torch.sin(angle))
    d = torch.cos(angle) - c * torch.tan(shear_x)
    linear = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2) / scale[:, None, None]
    middle = constant(center, linear)
    moved = middle - (linear * (middle + translate)[:, None]).sum(-1)  # no product, which autocast would lower
    return torch.cat([linear, moved[..., None]], -1)


def moved_points(points: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Where points of an image go that `resample` maps by these matrices. Where a matrix is the identity they stay.

    points: (batch, n, 2), x and y in pixels from the top left corner.
    matrices: (batch, 2, 3).
    size: (H, W).
    """
    matrices = matrices.to(points.dtype)
    linear, moved = matrices[:, :, :2], matrices[:, None, :, 2]
    middle = constant((size[1] / 2, size[0] / 2), points)
    (a, b), (c, d) = (row.unbind(-1) for row in linear[:, None].unbind(-2))
    x, y = (points - middle - moved).unbind(-1)
    result = torch.stack([d * x - b * y, a * y - c * x], -1) / (a * d - b * c)[..., None] + middle
    return torch.where(_is_identity(matrices).view(-1, 1, 1), points, result)


def rescaled(matrices: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Matrices for an image whose (height, width) are so many times those of the image that they were drawn for."""
    scale = constant((ratio[1], ratio[0]), matrices)
    linear = scale[:, None] * matrices[:, :, :2] / scale
    return torch.cat([linear, scale[:, None] * matrices[:, :, 2:]], -1)


def _is_identity(matrices: Tensor) -> Tensor:
    """(batch,), bool."""
    return (matrices == torch.eye(2, 3, dtype=matrices.dtype, device=matrices.device)).all(-1).all(-1)


@staged
def resample(x: Tensor, matrices: Tensor, *, mode: str, fill: tuple[float, ...] | None, **others: object) -> Tensor:
    """Images at the positions that inverse matrices map their pixels to.

    Where a matrix is the identity the image stays as it is, bit for bit.

    x: (batch, channels, H, W), or clips (batch, channels, T, H, W), all of whose frames are mapped alike.
    matrices: (batch, 2, 3), in pixels from the middle.
    mode: "nearest" or "bilinear".
    fill: outside of the image, one value, or one per channel; None stands for 0.
    others: settings that the matrices were drawn by.

    Returns a tensor in the shape and type of x.
    """
    if x.is_complex():
        parts = (resample(x.real, matrices, mode=mode, fill=fill), resample(x.imag, matrices, mode=mode, fill=None))
        return torch.complex(*parts)
    height, width = x.shape[-2:]
    images = (widen(x) if x.is_floating_point() else x.to(matrices.dtype)).flatten(1, -3)
    channels = images.shape[1]
    matrices = matrices.to(images.dtype)
    rows, columns = (
        torch.arange(size, dtype=images.dtype, device=x.device) - (size - 1) / 2 for size in (height, width)
    )
    pixels = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), columns.new_ones(height, width)])
    half = constant((width / 2, height / 2), images)
    with without_autocast(x.device.type):  # half precision has no place for each pixel
        grid = pixels.flatten(1).mT @ (matrices / half[:, None]).mT
    if fill is not None:
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    y = F.grid_sample(images, grid.unflatten(1, (height, width)), mode, "zeros", align_corners=False)
    if fill is not None:  # at the border torchvision weighs the image twice; so do we
        y, inside = y[:, :-1], y[:, -1:]
        inside = (inside >= 0.5).to(y.dtype) if mode == "nearest" else inside
        outside = per_channel(fill, x).to(y.dtype)
        outside = outside.repeat_interleave(channels // x.shape[1], 1) if len(fill) > 1 else outside
        y = inside * (y - outside) + outside
    still = _is_identity(matrices).view(-1, 1, 1, 1)
    y = y.lerp_(images[:, :channels], still.to(y.dtype)).reshape(x.shape)
    return (y if x.is_floating_point() else y.round()).to(x.dtype)
