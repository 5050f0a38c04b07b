"""Attention: primal and tangent share the explicit softmax probabilities."""

from __future__ import annotations

import operator

import torch.nn.functional as F

from fxstn.ir.tangents import ZERO
from fxstn.ops.attention import attention_tangent, attention_with_probabilities
from fxstn.ops.heads import (
    attention_scores,
    attention_values,
    join_heads,
    join_windows,
    mask_windows,
    split_heads,
    split_windows,
)
from fxstn.ops.kernels import expand_like
from fxstn.rules.registry import NoRule, linear, pointwise, rule, total


@rule(F.scaled_dot_product_attention)
def attention(
    d, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    if not isinstance(dropout_p, (int, float)) or dropout_p > 0:
        raise NoRule("its dropout is drawn inside; pass dropout_p=0 and drop the probabilities or the output instead")
    results = attention_with_probabilities(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    y, probabilities = operator.getitem(results, 0), operator.getitem(results, 1)
    tangents = tuple(None if t is ZERO else t for t in (d.query, d.key, d.value, d.attn_mask))
    return y, attention_tangent(tangents, query, key, value, scale, enable_gqa, probabilities)


linear(split_heads, join_heads, split_windows, join_windows, attention_values)
pointwise(mask_windows, lambda dx, y, x, *_: dx)


@rule(attention_scores)
def masked_scores(d, query, key, mask, is_causal, scale, grouped):
    settings = (None, False, scale, grouped)
    scores = attention_scores(query, key, mask, is_causal, scale, grouped)
    return scores, total(
        (d.query, lambda dq: attention_scores(dq, key, *settings)),
        (d.key, lambda dk: attention_scores(query, dk, *settings)),
        (d.mask, lambda dmask: expand_like(dmask, scores)),
    )
