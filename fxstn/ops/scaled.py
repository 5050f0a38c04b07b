"""The tangent of a layer whose weight and bias are scaled: few passes over its output, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ops.response import align


@staged
def scaled_tangent(
    tangent: Tensor | None,
    output: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bias_scale: Tensor | None,
    dim: int,
    batch_axis: BatchAxis = BATCH_FIRST,
) -> Tensor:
    """tangent + scale ⊙ (output − bias) + bias_scale ⊙ bias.

    tangent: shaped like `output`; None for zero.
    output: of a layer, its product and its bias.
    scale: (channels,), or (batch, channels) with a row per example.
    bias: (channels,), or None.
    bias_scale: as `scale`; None where the bias does not respond.
    dim: dimension of the channels in `output`.
    batch_axis: where the examples are in `output`.
    """
    scale = align(scale, output, dim, batch_axis)
    if bias is not None:
        bias = align(bias, output, dim)
        bias_scale = None if bias_scale is None else align(bias_scale, output, dim, batch_axis)
    if tangent is None:  # as where a network moves by a finite step, which torch.func may differentiate
        return output * scale if bias is None else torch.addcmul(bias * _change(scale, bias_scale), output, scale)
    result: Tensor = _ScaledTangent.apply(tangent, output, scale, bias, bias_scale)
    return result


def _change(scale: Tensor, bias_scale: Tensor | None) -> Tensor:
    return -scale if bias_scale is None else bias_scale - scale


class _ScaledTangent(torch.autograd.Function):
    """`scaled_tangent` of values that broadcast with the output.

    It is tangent + bias ⊙ (bias_scale − scale) + scale ⊙ output: no pass over the output for the product alone.
    """

    @staticmethod
    def forward(
        ctx: Any, tangent: Tensor, output: Tensor, scale: Tensor, bias: Tensor | None, bias_scale: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(output, scale, bias, bias_scale)
        if bias is None:
            return torch.addcmul(tangent, output, scale)
        return torch.addcmul(tangent, bias, _change(scale, bias_scale)).addcmul_(output, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        output, scale, bias, bias_scale = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        of_scale = of_bias = of_bias_scale = None
        if any(needs[2:]):
            of_scale, sums = _sums(grad, output, scale.shape, bias is not None)
            if sums is not None:
                moved = bias * sums
                of_scale = of_scale - moved
                of_bias_scale = moved if needs[4] else None
                of_bias = sums * _change(scale, bias_scale) if needs[3] else None
        return grad, grad * scale if needs[1] else None, of_scale, of_bias, of_bias_scale


def _sums(grad: Tensor, output: Tensor, shape: torch.Size, both: bool) -> tuple[Tensor, Tensor | None]:
    """(Σ grad ⊙ output, Σ grad) over the axes along which a `shape` that broadcasts with both has one entry.

    both: whether the second is asked for.

    Where these are the last ones, the backward kernel of group norm sums both at once, with every other entry as a channel,
    at mean 0 and deviation 1.
    """
    leading = next((i for i, (n, m) in enumerate(zip(shape, output.shape, strict=True)) if n != m), output.dim())
    rows, size = math.prod(shape[:leading]), math.prod(output.shape[leading:])
    fused = grad.is_contiguous() and output.is_contiguous() and grad.dtype == output.dtype
    if size == 1 or torch.is_grad_enabled() or not fused or math.prod(shape) != rows or not grad.numel():
        return (grad * output).sum_to_size(shape), grad.sum_to_size(shape) if both else None
    zero, one = torch.arange(2, dtype=grad.dtype, device=grad.device).view(2, 1, 1)
    kernel = torch.ops.aten.native_group_norm_backward
    unread = grad.new_empty(rows)  # a gain, of which only the sizes count
    _, products, sums = kernel(grad, output, zero, one, unread, 1, rows, size, 1, [False, True, both])
    return products.view(shape), sums.view(shape) if both else None
