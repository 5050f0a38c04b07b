"""Scaled dot-product attention with explicit probabilities, and its tangent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.kernels import softmax_jacobian


@staged
def attention_with_probabilities(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool
) -> tuple[Tensor, Tensor]:
    """(y, P) of softmax(scale · Q Kᵀ + mask) V. query (..., L, E), key (..., S, E), value (..., S, Ev), P (..., L, S).

    mask: bool (True: attended to) or float (added), broadcastable to P. grouped: each key head serves several query heads
    (dimension -3). A row with nothing to attend to gives zeros.
    """
    key, value = share_heads(key, query, grouped), share_heads(value, query, grouped)
    scores = torch.matmul(query * softmax_scale(query, scale), key.mT)
    if is_causal:
        rows, columns = scores.shape[-2:]
        future = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = torch.softmax(scores, -1)
    if mask is not None:
        probabilities = probabilities.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0)
    return torch.matmul(probabilities, value), probabilities


@staged
def attention_tangent(
    tangents: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    grouped: bool,
    probabilities: Tensor,
) -> Tensor:
    """dy = dP V + P dV, dP the softmax's Jacobian applied to dS = scale · (dQ Kᵀ + Q dKᵀ) + dmask.

    tangents: of Q, K, V and the mask, None for those that do not vary.
    """
    dq, dk, dv, dmask = tangents
    scaled = query * softmax_scale(query, scale)
    result = scores = None
    if dq is not None:
        scores = torch.matmul(dq * softmax_scale(query, scale), share_heads(key, query, grouped).mT)
    if dk is not None:
        scores = _plus(scores, torch.matmul(scaled, share_heads(dk, query, grouped).mT))
    if dmask is not None:
        scores = _plus(scores, dmask)
    if scores is not None:
        change = softmax_jacobian(scores.expand_as(probabilities), probabilities, -1)
        result = torch.matmul(change, share_heads(value, query, grouped))
    if dv is not None:
        result = _plus(result, torch.matmul(probabilities, share_heads(dv, query, grouped)))
    assert result is not None
    return result


def _plus(sum_so_far: Tensor | None, term: Tensor) -> Tensor:
    return term if sum_so_far is None else sum_so_far + term


def softmax_scale(query: Tensor, scale: float | None) -> float:
    """The factor of the scores; None: 1/√E."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def share_heads(heads: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """Key or value heads repeated along dimension -3 to the number of query heads, where `grouped`."""
    return heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) if grouped else heads
