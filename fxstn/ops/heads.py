"""The pieces of attention that depend on ranks and sizes: heads, masks, windows. Each is one node of a graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged


@staged
def split_heads(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """Heads in a dimension of their own.

    x: (batch, length, heads · d) where `batch_first`, else (length, batch, heads · d); (length, heads · d) without examples.

    Returns (batch, heads, length, d), or (heads, length, d).
    """
    x = x.unflatten(-1, (heads, -1))
    if x.dim() == 3:
        return x.transpose(0, 1)
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


@staged
def join_heads(x: Tensor, batch_first: bool) -> Tensor:
    """The inverse of `split_heads`.

    x: (batch, heads, length, d), or (heads, length, d).
    """
    if x.dim() == 3:
        return x.transpose(0, 1).flatten(-2)
    return (x.transpose(1, 2) if batch_first else x.permute(2, 0, 1, 3)).flatten(-2)


@staged
def joint_mask(query: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor:
    """One float mask to add to scores (batch, heads, length, source), −∞ where masked.

    Each mask is bool (True: masked, as in nn.MultiheadAttention) or float, and at least one of them is there.

    query: (batch, heads, length, d).
    attention: (length, source), or (batch · heads, length, source).
    padding: (batch, source).
    """

    def as_float(mask: Tensor) -> Tensor:
        zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        return zeros.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(query.dtype)

    parts = []
    if attention is not None:
        attention = as_float(attention)
        parts.append(attention.unflatten(0, (-1, query.shape[1])) if attention.dim() + query.dim() == 7 else attention)
    if padding is not None:
        parts.append(as_float(padding).unsqueeze(-2).unsqueeze(-2))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _padded(sizes: Sequence[int], window: Sequence[int]) -> list[int]:
    return [-(-size // w) * w for size, w in zip(sizes, window, strict=True)]


def _shift(sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """No shift along an axis that one window covers (Liu et al. 2021)."""
    return [s if w < size else 0 for size, w, s in zip(_padded(sizes, window), window, shift, strict=True)]


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(batch, *sizes, channels), sizes multiples of the window → (batch · windows, tokens of a window, channels)."""
    axes = len(window)
    for axis, w in reversed(list(enumerate(window, start=1))):
        x = x.unflatten(axis, (-1, w))
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    return x.permute(order).flatten(axes + 1, 2 * axes).flatten(0, axes)


@staged
def split_windows(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Windows of an image, which is padded with zeros to whole windows, and shifted.

    x: (batch, *sizes, channels).
    window, shift: one number for each size.

    Returns (batch · windows, tokens of a window, channels).
    """
    sizes = x.shape[1:-1]
    padding = [amount for size, full in zip(sizes, _padded(sizes, window), strict=True) for amount in (full - size, 0)]
    moves = [-s for s in _shift(sizes, window, shift)]
    x = F.pad(x, (0, 0, *reversed(padding)))
    return _partition(torch.roll(x, moves, list(range(1, len(window) + 1))), window)


@staged
def join_windows(x: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of `split_windows`; the padding is cut off.

    x: (batch · windows, tokens of a window, channels).
    like: (batch, *sizes, ...), read for its shape only.
    window, shift: one number for each size.

    Returns (batch, *sizes, channels).
    """
    sizes, axes = like.shape[1:-1], len(window)
    grid = [full // w for full, w in zip(_padded(sizes, window), window, strict=True)]
    x = x.reshape(like.shape[0], *grid, *window, x.shape[-1])
    order = [0, *itertools.chain.from_iterable((1 + i, 1 + axes + i) for i in range(axes)), 2 * axes + 1]
    x = x.permute(order)
    for axis in range(1, axes + 1):
        x = x.flatten(axis, axis + 1)
    x = torch.roll(x, _shift(sizes, window, shift), list(range(1, axes + 1)))
    return x[(slice(None), *(slice(size) for size in sizes))].contiguous()


@staged
def mask_windows(scores: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Scores less 100 between tokens that only the shift brought together.

    scores: (batch · windows, heads, tokens, tokens).
    like: (batch, *sizes, ...), the image, read for its shape only.
    window, shift: one number for each size.
    """
    sizes = like.shape[1:-1]
    moves = _shift(sizes, window, shift)
    if not any(moves):
        return scores
    region = torch.zeros(_padded(sizes, window), device=scores.device)
    for axis, (w, s) in enumerate(zip(window, moves, strict=True)):
        numbers = torch.zeros(region.shape[axis], device=scores.device)
        numbers[-w:] = 1
        numbers[-s or len(numbers) :] = 2
        region = 3 * region + numbers.view([-1 if i == axis else 1 for i in range(region.dim())])
    tokens = _partition(region[None, ..., None], window).squeeze(-1)
    mask = (tokens.unsqueeze(1) != tokens.unsqueeze(2)).to(scores.dtype) * -100.0
    return (scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
