"""Scaled dot-product attention and its tangent, whose gradient is that of attention, by torch's fused kernel."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxstn.ir.staging import staged
from fxstn.ops.attention import attention_scores, attention_values, low_weights, scaled_query
from fxstn.ops.kernels import expand_like, softmax_jacobian
from fxstn.ops.linear_maps import Context, by_single_operations
from fxstn.ops.precision import low, without_autocast

AT_ONCE = 2**27  # probabilities that are written at once, where nothing of them is kept
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]  # of query, key and value; None: it has none


@staged
def attention_and_tangent(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tangents: Tangents, of_mask: Tensor | None,
    is_causal: bool, scale: float | None, grouped: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, dy): y = softmax(scale · Q Kᵀ + mask) V, and its derivative along the tangents.

    query, key, value, mask, is_causal, scale, grouped: as in `attention_scores`; no dropout.
    tangents: of query, key and value, in their shapes.
    of_mask: that of the mask, if it has one.

    dy is linear in the tangents. Where they alone have gradients, these are the gradients of attention itself, which torch
    computes by one kernel. Nothing as large as the probabilities is then kept for the backward pass.
    """
    if of_mask is not None or by_single_operations(query, key, value, mask):
        settings = (is_causal, scale, grouped)
        weights, value, dy = _written_out(query, key, value, mask, tangents, of_mask, *settings)
        return torch.matmul(weights, value), dy
    dtype = low(query)
    several = [x if x is None or x.dtype == torch.bool else x.to(dtype) for x in (query, key, value, mask, *tangents)]
    y, dy = _AttentionTangent.apply(*several, is_causal, scale, grouped)
    return y, dy


@staged
def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V by operations that torch can vectorise; arguments as in `attention_and_tangent`."""
    weights = low_weights(attention_scores(query, key, mask, is_causal, scale, grouped), mask is not None)
    return torch.matmul(weights, attention_values(value, query, grouped))


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tangents: Tangents, of_mask: Tensor | None,
    is_causal: bool, scale: float | None, grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(P, V with a head per head of the query, dP V + P dV), by operations that can be differentiated again.

    dP is the softmax's Jacobian times dS = dQ Kᵀ + Q dKᵀ + dmask, which is finite also where the scores are −∞.
    """
    dquery, dkey, dvalue = tangents
    value = attention_values(value, query, grouped).contiguous()
    query, key, factors = _factors(query, key, dquery, dkey, scale, grouped)
    scores = attention_scores(query, key, mask, is_causal, 1.0, False)
    weights = low_weights(scores, mask is not None)
    of_scores = [torch.matmul(left, right.mT) for left, right in factors] + ([] if of_mask is None else [of_mask])
    terms = []
    if of_scores:
        dscores = expand_like(functools.reduce(torch.add, of_scores), scores)
        terms.append(torch.matmul(softmax_jacobian(dscores, weights, -1), value))
    if dvalue is not None:
        terms.append(torch.matmul(weights, attention_values(dvalue, query, grouped).contiguous()))
    return weights, value, functools.reduce(torch.add, terms)


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tangents: Tangents, is_causal: bool,
    scale: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """dy, for as many rows of Q at once as `AT_ONCE` allows, and the columns that these attend to."""
    length, columns = query.shape[-2], key.shape[-2]
    rows = max(1, AT_ONCE // max(1, query.shape[:-2].numel() * columns))
    if rows >= length:
        return _written_out(query, key, value, mask, tangents, None, is_causal, scale, grouped)[2]
    pieces, (dquery, dkey, dvalue) = [], tangents
    for start in range(0, length, rows):
        own, seen = slice(start, start + rows), slice(start + rows if is_causal else columns)
        seen_by = mask if mask is None or mask.shape[-2] == 1 else mask[..., own, :]
        if is_causal:
            size = (min(rows, length - start), min(start + rows, columns))
            seen_by = torch.ones(size, dtype=torch.bool, device=query.device).tril(start)
        q, dq = query[..., own, :], None if dquery is None else dquery[..., own, :]
        dk, dv = (None if x is None else x[..., seen, :] for x in (dkey, dvalue))
        k, v = key[..., seen, :], value[..., seen, :]
        pieces.append(_written_out(q, k, v, seen_by, (dq, dk, dv), None, False, scale, grouped)[2])
    return torch.cat(pieces, -2)


def _factors(
    query: Tensor, key: Tensor, dquery: Tensor | None, dkey: Tensor | None, scale: float | None, grouped: bool
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(scale · Q, K, what dS is the product of). The heads of a layer lie apart in memory, and are brought together once."""
    if dquery is not None and dkey is not None:  # one product of (Q, dQ) and (dK, K)
        width = query.shape[-1]
        left = scaled_query(torch.cat((query, dquery), -1), 1 / math.sqrt(width) if scale is None else scale)
        right = attention_values(torch.cat((dkey, key), -1), query, grouped)
        return left[..., :width], right[..., width:], [(left, right)]
    key = attention_values(key, query, grouped).contiguous()
    if dquery is not None:
        return scaled_query(query, scale).contiguous(), key, [(scaled_query(dquery, scale), key)]
    query = scaled_query(query, scale).contiguous()
    return query, key, [] if dkey is None else [(query, attention_values(dkey, query, grouped))]


class _AttentionTangent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dquery: Tensor | None,
        dkey: Tensor | None, dvalue: Tensor | None, is_causal: bool, scale: float | None, grouped: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with without_autocast(query.device.type):
            ctx.sources = sources = [x.detach().requires_grad_() for x in (query, key, value)]
            with torch.enable_grad():
                ctx.y = F.scaled_dot_product_attention(
                    sources[0], sources[1], sources[2], mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
                )
            ctx.mark_non_differentiable(y := ctx.y.detach())
            return y, _by_rows(query, key, value, mask, (dquery, dkey, dvalue), is_causal, scale, grouped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[4:7]
        sources = [source for source, needs in zip(ctx.sources, needed, strict=True) if needs]
        own = iter(torch.autograd.grad(ctx.y, sources, grads[1], retain_graph=True))
        return None, None, None, None, *[next(own) if needs else None for needs in needed], None, None, None
