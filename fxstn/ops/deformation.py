"""Deformable convolution (Dai et al. 2017): its tangent in the offsets of what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged


def _slopes(image: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Derivatives in y and in x of an image, bilinear between pixels and 0 outside, at positions (y, x).

    image: (batch, groups, channels, height · width).
    y, x: (batch, groups, positions).

    Returns two tensors (batch, groups, channels, positions).
    """
    top, left = y.floor(), x.floor()
    v, u = ((position - low).unsqueeze(2) for position, low in ((y, top), (x, left)))

    def at(row: Tensor, column: Tensor) -> Tensor:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        numbers = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().unsqueeze(2)
        return image.gather(-1, numbers.expand(-1, -1, image.shape[2], -1)) * inside.unsqueeze(2)

    a, b, c, d = at(top, left), at(top, left + 1), at(top + 1, left), at(top + 1, left + 1)
    return (1 - u) * (c - a) + u * (d - b), (1 - v) * (b - a) + v * (d - c)


@staged
def offset_shift(
    tangent: Tensor, image: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, offset_groups: int, use_mask: bool,
) -> Tensor:  # fmt: skip
    """Tangent of torchvision's deform_conv2d in the offsets.

    tangent, offset: (batch, offset_groups · kernel · 2, h, w), in pixels, y first.
    image: (batch, channels, H, W).
    weight: (out, channels / groups, rows, columns).
    mask: (batch, offset_groups · kernel, h, w), read where `use_mask`.
    stride, padding, dilation: y first.

    Returns (batch, out, h, w).
    """
    batch, channels, *size = image.shape
    out, _, *kernel = weight.shape
    h, w = offset.shape[2:]
    shape = (batch, offset_groups, *kernel, 2, h, w)
    shift, moved = offset.reshape(shape), tangent.reshape(shape)
    positions = []
    for axis in (0, 1):
        taps = torch.arange(kernel[axis], device=image.device).mul(dilation[axis]).sub(padding[axis])
        places = torch.arange((h, w)[axis], device=image.device).mul(stride[axis])
        grid = taps.view([-1 if i == axis else 1 for i in range(4)]) + places.view(
            [-1 if i == axis + 2 else 1 for i in range(4)]
        )
        positions.append((shift[:, :, :, :, axis] + grid).flatten(2))
    pixels = image.reshape(batch, offset_groups, channels // offset_groups, -1)
    in_y, in_x = _slopes(pixels, positions[0], positions[1], *size)
    change = in_y * moved[:, :, :, :, 0].flatten(2).unsqueeze(2) + in_x * moved[:, :, :, :, 1].flatten(2).unsqueeze(2)
    if use_mask:
        change = change * mask.reshape(batch, offset_groups, 1, -1)
    columns = change.reshape(batch, groups, channels // groups * kernel[0] * kernel[1], h * w)
    return (weight.reshape(groups, out // groups, -1) @ columns).reshape(batch, out, h, w)
