"""Blocks that are dropped from feature maps (batch, channels, sizes...), of two or three dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ops.noise import by_example
from fxstn.ops.precision import wide

_POOLS = {2: F.max_pool2d, 3: F.max_pool3d}


def block_mask(
    x: Tensor, p: Tensor | float, block_size: int, gamma_scale: float, coupled: bool, inside: bool
) -> Tensor:
    """Where blocks cover a feature map (Ghiasi et al. 2018, arXiv 1810.12890), 1 or 0: x.shape, or one channel where coupled.

    x: (batch, channels, sizes...).
    p: share of the entries to cover, about; a number, 0-d, or (batch,).
    block_size: side of a block, at most that of the map.
    gamma_scale: factor of the probability γ that a block is at a place.
    coupled: the channels have the same blocks.
    inside: blocks are whole; else they may be cut at the borders, and γ is the same.

    Raises ValueError for a value that is no feature map.
    """
    sizes = x.shape[2:]
    if len(sizes) not in _POOLS:
        raise ValueError(f"hp.DropBlock: a value of shape {tuple(x.shape)} has no blocks; it takes (batch, channels, H, W), or "
                         "three sizes")  # fmt: skip
    kernel = [min(block_size, *sizes) if inside else min(block_size, size) for size in sizes]
    places = [size - side + 1 for size, side in zip(sizes, kernel, strict=True)]
    gamma = by_example(p, x) * (gamma_scale * math.prod(sizes) / (math.prod(kernel) * math.prod(places)))
    shape = (x.shape[0], 1 if coupled else x.shape[1], *(places if inside else sizes))
    covered = (torch.rand(shape, device=x.device, dtype=wide(x.dtype)) < gamma).to(x.dtype)
    # A block at a place covers the entries from side // 2 before it on; whole blocks begin at their places.
    before = [side - 1 if inside else side - 1 - side // 2 for side in kernel]
    after = [side - 1 if inside else side // 2 for side in kernel]
    margins = [margin for pair in zip(before[::-1], after[::-1], strict=True) for margin in pair]
    return _POOLS[len(sizes)](F.pad(covered, margins), kernel, 1)


def block_multiplier(x: Tensor, p: Tensor | float, scaled: bool, **blocks: Any) -> Tensor:
    """Multiplier of DropBlock: 0 where a block is, else 1.

    x, p: as in `block_mask`.
    scaled: the entries that are left are scaled to a mean of 1, over the batch at one strength, else in each example.
    blocks: the further arguments of `block_mask`.
    """
    left = 1 - block_mask(x, p, **blocks)
    if not scaled:
        return left
    several = isinstance(p, Tensor) and p.dim() > 0
    share = left.to(wide(left.dtype)).mean(dim=tuple(range(int(several), left.dim())), keepdim=True)
    return (left / share.clamp_min(1e-6)).to(left.dtype)
