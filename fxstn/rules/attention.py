"""Attention: primal and tangent share scores and softmax probabilities."""

from __future__ import annotations

import torch.nn.functional as F

from fxstn.ir.tangents import ZERO
from fxstn.ops.attention import attention_scores, attention_values
from fxstn.ops.attention_tangent import attention_and_tangent, attention_by_products
from fxstn.ops.heads import join_heads, join_windows, mask_windows, split_heads, split_windows
from fxstn.ops.kernels import expand_like
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import linear, rule, total


@rule(F.scaled_dot_product_attention, fresh=True)
def attention(
    d, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """dy = dP V + P dV; dP is the softmax's Jacobian applied to the tangent of the scores."""
    if not isinstance(dropout_p, (int, float)) or dropout_p > 0:
        raise NoRule("its dropout is drawn inside; pass dropout_p=0 and drop the probabilities or the output instead")
    settings = (is_causal, scale, enable_gqa)
    dquery, dkey, dvalue, of_mask = (None if dx is ZERO else dx for dx in (d.query, d.key, d.value, d.attn_mask))
    if all(dx is None for dx in (dquery, dkey, dvalue, of_mask)):
        return attention_by_products(query, key, value, attn_mask, *settings), ZERO
    pair = attention_and_tangent(query, key, value, attn_mask, (dquery, dkey, dvalue), of_mask, *settings)
    return pair[0], pair[1]


@rule(attention_scores)
def masked_scores(d, query, key, mask, is_causal, scale, grouped):
    scores = attention_scores(query, key, mask, is_causal, scale, grouped)
    return scores, _scores_tangent(d.query, d.key, d.mask, query, key, scores, scale, grouped)


def _scores_tangent(dquery, dkey, dmask, query, key, scores, scale, grouped):
    """scale · (dQ Kᵀ + Q dKᵀ) + dmask; finite also where the scores are −∞."""
    settings = (None, False, scale, grouped)
    tangent = total(
        (dquery, lambda dq: attention_scores(dq, key, *settings)),
        (dkey, lambda dk: attention_scores(query, dk, *settings)),
        (dmask, lambda dmask: dmask),
    )
    return total((tangent, lambda tangent: expand_like(tangent, scores)))


@rule(attention_values, kind="linear")
def values_of_heads(d, value, query, grouped):
    return attention_values(value, query, grouped), total((d.value, lambda dv: attention_values(dv, query, grouped)))


@rule(join_windows, kind="linear")
def joined_windows(d, x, like, window, shift):
    return join_windows(x, like, window, shift), total((d.x, lambda dx: join_windows(dx, like, window, shift)))


@rule(mask_windows)
def masked_windows(d, scores, like, window, shift):
    return mask_windows(scores, like, window, shift), d.scores


linear(split_heads, join_heads, split_windows)
