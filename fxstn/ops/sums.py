"""Sums of a product and other terms, in fewer passes over memory than a product and then a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ops.linear_maps import Context, by_single_operations, differentiates
from fxstn.ops.norms import INPUT_ONLY, alike, layer_norm_core, layer_norm_jacobian
from fxstn.ops.precision import low
from fxstn.ops.response import align
from fxstn.ops.scaled import channel_sums, scaled_tangent


@staged
def scaled_product(
    tangent: Tensor,
    weight: Tensor,
    output: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    dim: int,
    batch_axis: BatchAxis = BATCH_FIRST,
    ends: Tensor | None = None,
) -> Tensor:
    """`scaled_tangent` of W dx: the matrix product adds to the two other terms, and these are one kernel.

    tangent: dx, (..., n).
    weight: W, (channels, n), a constant.
    Others as in `scaled_tangent`.
    """
    if _by_torch(tangent, weight, output) or not output.is_contiguous():
        return scaled_tangent(F.linear(tangent, weight), output, scale, shift, dim, batch_axis, ends)
    scale = align(scale, output, dim, batch_axis)
    shift = None if shift is None else align(shift, output, dim, batch_axis)
    result: Tensor = _ScaledProduct.apply(tangent, weight, output, scale, shift, ends)
    return result


@staged
def scaled_layer_norm(
    tangent: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shape: Sequence[int],
    output: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    dim: int,
    batch_axis: BatchAxis = BATCH_FIRST,
    ends: Tensor | None = None,
    lowered: bool = False,
) -> Tensor:
    """`scaled_tangent` of `layer_norm_jacobian`, whose product with the weight is part of the sum.

    tangent, x, weight, mean, inverse_std, shape: as in `layer_norm_jacobian`; constants but for the tangent.
    lowered: whether only products read the result, which gets the type that autocast gives them.
    Others as in `scaled_tangent`.
    """
    if _by_torch(tangent, weight, output) or differentiates(x):
        own = layer_norm_jacobian(tangent, x, weight, mean, inverse_std, shape)
        return scaled_tangent(own, output, scale, shift, dim, batch_axis, ends)
    x, weight = alike(x, weight)
    scale = align(scale, output, dim, batch_axis)
    shift = None if shift is None else align(shift, output, dim, batch_axis)
    statistics, dtype = (mean, inverse_std, tuple(shape)), low(output) if lowered else output.dtype
    result: Tensor = _ScaledLayerNorm.apply(tangent, x, weight, *statistics, output, scale, shift, ends, dtype)
    return result


@staged
def add_product(rest: Tensor, value: Tensor, factor: Tensor | int) -> Tensor:
    """rest + value ⊙ factor by one kernel.

    factor: what noise multiplies the value by, a constant that broadcasts with it; 1 where there is none.
    """
    if not isinstance(factor, Tensor):
        return rest + value
    if rest.shape != value.shape or _by_torch(rest, value) or rest.is_complex() or not value.is_floating_point():
        return rest + value * factor
    if not differentiates(rest, value):
        return torch.addcmul(rest, value, factor)
    result: Tensor = _AddProduct.apply(rest, value, factor)
    return result


def _by_torch(tangent: Tensor, *constants: Tensor) -> bool:
    """Whether single operations compute it, as they also do for a tangent without entries."""
    return by_single_operations(*constants) or not tangent.numel()


def _two_terms(output: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    return output * scale if shift is None else torch.addcmul(shift, output, scale)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        tangent: Tensor,
        weight: Tensor,
        output: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        ends: Tensor | None,
    ) -> Tensor:
        result, weight = _two_terms(output, scale, shift), weight.to(output.dtype)
        rows = tangent.to(output.dtype).reshape(-1, tangent.shape[-1])
        result.view(-1, len(weight)).addmm_(rows, weight.t())
        ctx.save_for_backward(weight, output, scale, ends)
        ctx.shape = tangent.shape
        return result

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        weight, output, scale, ends = ctx.saved_tensors
        grad, (of_tangent, _, _, of_scale, of_shift, _) = grads[0], ctx.needs_input_grad
        own = products = sums = None
        if of_scale or of_shift:
            products, sums = channel_sums(grad, output.conj(), scale.shape, of_shift, ends)
        if of_tangent:
            own = (grad.reshape(-1, len(weight)) @ weight.conj()).view(ctx.shape)
        return own, None, None, products, sums, None


class _ScaledLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, tangent: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, shape: Sequence[int],
        output: Tensor, scale: Tensor, shift: Tensor | None, ends: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        core = layer_norm_core(tangent, x, mean, inverse_std, shape)
        ctx.save_for_backward(x, weight, mean, inverse_std, output, scale, ends)
        ctx.shape = shape
        terms = _two_terms(output, scale, shift)
        if dtype == terms.dtype:
            return torch.addcmul(terms, core, weight)  # not in place, as in `_ScaledTangent`
        return torch.addcmul(terms, core, weight, out=torch.empty_like(terms, dtype=dtype))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        x, weight, mean, inverse_std, output, scale, ends = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad
        own = products = sums = None
        if needed[7] or needed[8]:
            products, sums = channel_sums(grad, output, scale.shape, needed[8], ends)
        if needed[0]:
            kernel = torch.ops.aten.native_layer_norm_backward
            own = kernel(grad.to(x.dtype), x, ctx.shape, mean, inverse_std, weight, None, INPUT_ONLY)[0]
        return own, *[None] * 6, products, sums, None, None


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, rest: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = value.dtype
        return torch.addcmul(rest, value, factor)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        (factor,), grad, (of_rest, of_value, _) = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        if not of_value:
            return grad, None, None
        if torch.is_grad_enabled():  # to be differentiated again
            return grad if of_rest else None, (grad * factor).to(ctx.dtype), None
        own = torch.mul(grad, factor, out=torch.empty_like(grad, dtype=ctx.dtype))  # rounded as it is written
        return grad if of_rest else None, own, None
