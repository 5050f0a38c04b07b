"""Pieces of scaled dot-product attention: scores, probabilities and values. Dropout between them is a node of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxstn.ir.staging import in_graph, staged
from fxstn.ops.precision import without_autocast

in_graph(torch._safe_softmax)  # torch.compile does not know it by this name


@staged
def scaled_query(query: Tensor, scale: float | None) -> Tensor:
    """scale · Q.

    query: (..., L, E).
    scale: None stands for 1/√E.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return query if factor == 1 else query * factor


@staged
def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """scale · Q Kᵀ + mask: what attention takes the softmax of.

    query: (..., L, E).
    key: (..., S, E); with fewer heads than the query, along dimension −3, where `grouped`.
    mask: broadcasts to (..., L, S); bool (True: attended to), or float, which is added.
    is_causal: row i attends to columns 0 to i only.
    scale: None stands for 1/√E.

    Returns (..., L, S), −∞ where nothing is attended to.
    """
    scores = torch.matmul(scaled_query(query, scale), attention_values(key, query, grouped).mT)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The probabilities of scores (..., L, S), by an operation of torch that a graph has as a node.

    A mask may leave a row with nothing to attend to: its probabilities are 0, as in torch.
    """
    return torch.softmax(scores, -1) if mask is None else torch._safe_softmax(scores, -1)


@staged
def low_weights(scores: Tensor, masked: bool) -> Tensor:
    """`attention_weights` in the type of the scores: autocast would widen them, and narrow the result for each product.

    masked: whether a row may have nothing to attend to.
    """
    with without_autocast(scores.device.type):
        return torch._safe_softmax(scores, -1) if masked else torch.softmax(scores, -1)


@staged
def attention_values(value: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """Values with one head per head of the query.

    value: (..., heads, S, E).
    query: (..., several · heads, L, E), read for its shape only.
    grouped: whether one head of `value` serves several heads of the query; without it, `value` is returned as it is.
    """
    return value.repeat_interleave(query.shape[-3] // value.shape[-3], -3) if grouped else value
