"""Attention modules and functions, and stochastic depth, as the operations that they compute.

Two functions of torchvision are here: Swin's window attention and `stochastic_depth`. Modules of torchvision are in
`decompositions.torchvision`. The arguments are tensors, or proxies in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import shifted_window_attention
from torchvision.models.video.swin_transformer import shifted_window_attention_3d
from torchvision.ops import stochastic_depth

from fxstn.frontends.decompositions.registry import decomposes
from fxstn.ops.attention import attention_scores, attention_values, attention_weights
from fxstn.ops.heads import join_heads, join_windows, joint_mask, mask_windows, split_heads, split_windows
from fxstn.ops.noise import row_mask


@decomposes(F.scaled_dot_product_attention)
def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float | fx.Proxy = 0.0,
    is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention that drops its probabilities: scores, softmax, dropout and product. Without dropout it stays one operation.

    A row with nothing to attend to gives zeros, as in torch.
    """
    if not isinstance(dropout_p, fx.Proxy) and dropout_p == 0:
        return NotImplemented
    scores = attention_scores(query, key, attn_mask, is_causal, scale, enable_gqa)
    weights = attention_weights(scores, attn_mask)
    return torch.matmul(F.dropout(weights, cast(float, dropout_p), True), attention_values(value, query, enable_gqa))


@decomposes(nn.MultiheadAttention)
def multi_head_attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """nn.MultiheadAttention without its fast paths and shape checks. A causal hint needs its mask, which is used.

    A row with nothing to attend to gives zeros, and NaN where the weights are asked for, as in torch.
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise NotImplementedError("add_bias_kv and add_zero_attn of nn.MultiheadAttention")
    if is_causal and attn_mask is None:
        raise ValueError("nn.MultiheadAttention: is_causal is a hint and needs attn_mask")
    if query is key and key is value and module.in_proj_weight is not None:
        q, k, v = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    else:
        q, k, v = _projected(module, query, key, value)
    q, k, v = (split_heads(x, module.num_heads, module.batch_first) for x in (q, k, v))
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        mask = joint_mask(q, attn_mask, key_padding_mask)
    p = module.dropout if module.training else 0.0
    if need_weights:
        weights = torch.softmax(attention_scores(q, k, mask, False, None, False), -1)
        weights = F.dropout(weights, p, True) if p else weights
        output = torch.matmul(weights, v)
        weights = weights.mean(-3) if average_attn_weights else weights
    else:
        output, weights = F.scaled_dot_product_attention(q, k, v, mask, p), None
    joined = join_heads(output, module.batch_first)
    return F.linear(joined, module.out_proj.weight, module.out_proj.bias), weights


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    if module.in_proj_weight is not None:
        a, b, c = module.in_proj_weight.chunk(3)
    else:
        a, b, c = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases: list[Tensor | None] = [None] * 3
    if module.in_proj_bias is not None:
        p, q, r = module.in_proj_bias.chunk(3)
        biases = [p, q, r]
    return [F.linear(x, w, bias) for x, w, bias in zip((query, key, value), (a, b, c), biases, strict=True)]


@decomposes(nn.TransformerEncoderLayer)
def encoder_layer(
    module: nn.TransformerEncoderLayer, src: Tensor, src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """nn.TransformerEncoderLayer without its fast path."""
    x, masks = src, (src_mask, src_key_padding_mask, is_causal)
    if module.norm_first:
        x = x + module._sa_block(module.norm1(x), *masks)
        return x + module._ff_block(module.norm2(x))
    x = module.norm1(x + module._sa_block(x, *masks))
    return module.norm2(x + module._ff_block(x))


@decomposes(nn.TransformerEncoder)
def encoder(
    module: nn.TransformerEncoder, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:  # fmt: skip
    """nn.TransformerEncoder without nested tensors."""
    for layer in module.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
    return src if module.norm is None else module.norm(src)


@decomposes(nn.TransformerDecoder)
def decoder(
    module: nn.TransformerDecoder, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None, tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None, tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """nn.TransformerDecoder; the causal hint is not looked for in the mask."""
    masks = {
        "tgt_mask": tgt_mask,
        "memory_mask": memory_mask,
        "tgt_key_padding_mask": tgt_key_padding_mask,
        "memory_key_padding_mask": memory_key_padding_mask,
    }
    for layer in module.layers:
        tgt = layer(tgt, memory, **masks)
    return tgt if module.norm is None else module.norm(tgt)


@decomposes(nn.Transformer)
def transformer(
    module: nn.Transformer, src: Tensor, tgt: Tensor, src_mask: Tensor | None = None, tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
    src_is_causal: bool | None = None, tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """nn.Transformer without its shape checks."""
    memory = module.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    paddings = {
        "tgt_key_padding_mask": tgt_key_padding_mask,
        "memory_key_padding_mask": memory_key_padding_mask,
    }
    return module.decoder(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, **paddings)


@decomposes(shifted_window_attention, shifted_window_attention_3d)
def window_attention(
    input: Tensor, qkv_weight: Tensor, proj_weight: Tensor, relative_position_bias: Tensor, window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int], attention_dropout: float = 0.0, dropout: float = 0.0, qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None, logit_scale: Tensor | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    """Window attention of Swin (Liu et al. 2021) in two or three dimensions, with a scale the cosine one of its version 2."""
    x = split_windows(input, window_size, shift_size)
    if logit_scale is not None and qkv_bias is not None:  # version 2 has no bias on the keys
        q_bias, _, v_bias = qkv_bias.chunk(3)
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
    q, k, v = (split_heads(part, num_heads, True) for part in (q, k, v))
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=4.605170185988092).exp()  # ln 100
    else:
        scores = attention_scores(q, k, None, False, None, False)
    scores = mask_windows(scores + relative_position_bias, input, window_size, shift_size)
    weights = F.dropout(F.softmax(scores, dim=-1), attention_dropout, training)
    x = F.linear(join_heads(torch.matmul(weights, v), True), proj_weight, proj_bias)
    return join_windows(F.dropout(x, dropout, training), input, window_size, shift_size)


@decomposes(stochastic_depth)
def row_dropout(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """Stochastic depth (Huang et al. 2016): whole examples of a branch are dropped, or the whole batch."""
    if not training or p == 0.0:
        return input
    return input * row_mask(input, p, mode == "batch")
