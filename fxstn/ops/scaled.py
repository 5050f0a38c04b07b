"""The tangent of a layer whose weight and bias are scaled: few passes over its output, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, Place
from fxstn.ops.precision import has_autocast
from fxstn.ops.response import align


@staged
def scaled_tangent(
    tangent: Tensor | None,
    output: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    dim: int,
    batch_axis: Place = BATCH_FIRST,
    ends: Tensor | None = None,
) -> Tensor:
    """tangent + scale ⊙ output + shift: of a layer whose product and bias are `output`.

    tangent: shaped like `output`; None for zero.
    scale: (channels,), or (batch, channels) with a row per example.
    shift: as `scale`, from `bias_shift`; None without a bias.
    dim: dimension of the channels in `output`.
    batch_axis: where the examples are in `output`.
    ends: (0, 1), where it is at hand. The layer may then be differentiated by autograd alone, not by torch.func.
    """
    scale = align(scale, output, dim, batch_axis)
    shift = None if shift is None else align(shift, output, dim, batch_axis)
    vectorised = torch._C._are_functorch_transforms_active()
    if vectorised or (tangent is None and ends is None):  # as where a network moves by a finite step
        product = output * scale if shift is None else torch.addcmul(shift, output, scale)
        return product if tangent is None else tangent + product
    result: Tensor = _ScaledTangent.apply(tangent, output, scale, shift, ends)
    return result


@staged
def bias_shift(scale: Tensor, bias: Tensor, bias_scale: Tensor | None) -> Tensor:
    """(bias_scale − scale) ⊙ bias: what a layer's tangent has besides scale ⊙ output, shaped like `scale`.

    bias: (channels,).
    bias_scale: as `scale`; None where the bias does not respond.
    """
    return bias * (-scale if bias_scale is None else bias_scale - scale)


@staged
def scales_and_shifts(
    flat_U: Tensor,
    delta: Tensor,
    sizes: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    biases: Sequence[Tensor],
    lowered: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """U δ of each block of U, with `bias_shift` in place of the scales of biases: one product for all.

    flat_U: (N, h).
    delta: (h,) or (batch, h).
    sizes: rows of each block.
    pairs: (block of the weight, block of the bias) of each layer with such a bias; no block is in two of them.
    biases: (rows of the block,) of each, real.
    lowered: blocks that only products read, which get them in the type that autocast gives products.

    Returns (n,), or (batch, n), of each block.
    """
    device = flat_U.device.type
    delta = delta.to(flat_U.dtype)
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tuple(_ScalesAndShifts.apply(flat_U, delta, tuple(sizes), tuple(pairs), (), None, *biases))
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return tuple(_ScalesAndShifts.apply(flat_U, delta, tuple(sizes), tuple(pairs), tuple(lowered), dtype, *biases))


@staged
def zero_and_one(like: Tensor) -> Tensor:
    """(0, 1), in the type and on the device of a tensor."""
    return torch.arange(2, dtype=like.dtype, device=like.device)


class _ScaledTangent(torch.autograd.Function):
    """`scaled_tangent` of values that broadcast with the output."""

    @staticmethod
    def forward(
        ctx: Any, tangent: Tensor | None, output: Tensor, scale: Tensor, shift: Tensor | None, ends: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(output, scale, ends)
        if tangent is None or shift is None:
            rest = shift if tangent is None else tangent
            return output * scale if rest is None else torch.addcmul(rest, output, scale)
        # not in place: torch 2.11's Dynamo gives the gradient of such a result to the operand, and none to this function
        return torch.addcmul(torch.add(tangent, shift), output, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        output, scale, ends = ctx.saved_tensors
        grad, (of_tangent, of_output, of_scale, of_shift, _) = grads[0], ctx.needs_input_grad
        products = sums = None
        if of_scale or of_shift:
            products, sums = channel_sums(grad, output.conj(), scale.shape, of_shift, ends)
        return grad if of_tangent else None, grad * scale.conj() if of_output else None, products, sums, None


class _ScalesAndShifts(torch.autograd.Function):
    """The blocks of δ Vᵀ, where V is U with b ⊙ (U_b − U_w) in the rows of each bias b."""

    @staticmethod
    def forward(
        ctx: Any,
        flat_U: Tensor,
        delta: Tensor,
        sizes: tuple[int, ...],
        pairs: tuple[tuple[int, int], ...],
        lowered: tuple[int, ...],
        dtype: torch.dtype | None,
        *biases: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        blocks = list(flat_U.split(sizes))
        of_weights, of_biases = ([blocks[pair[side]] for pair in pairs] for side in (0, 1))
        ones = flat_U.new_ones(max(sizes))
        factors = [ones[:size] for size in sizes]
        for (_, block), bias, change in zip(pairs, biases, torch._foreach_sub(of_biases, of_weights), strict=True):
            blocks[block], factors[block] = change, bias.to(flat_U.dtype)
        ctx.groups = [[block for block in range(len(sizes)) if (block in lowered) == low] for low in (False, True)]
        order = [block for group in ctx.groups for block in group]
        factor = torch.cat([factors[block] for block in order])[:, None]
        moves = torch.cat([blocks[block] for block in order]).mul_(factor)
        ctx.save_for_backward(delta, moves, factor)
        ctx.sizes, ctx.pairs = sizes, pairs
        result: dict[int, Tensor] = {}
        rows = [sum(sizes[block] for block in group) for group in ctx.groups]
        for group, part in zip(ctx.groups, torch.nn.functional.linear(delta, moves).split(rows, -1), strict=True):
            own = part.to(dtype) if group and group[0] in lowered else part
            result |= zip(group, own.split([sizes[block] for block in group], -1), strict=True)
        return tuple(result[block] for block in range(len(sizes)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        delta, moves, factor = ctx.saved_tensors
        shape = delta.shape[:-1]
        whole = [delta.new_zeros(*shape, size) if g is None else g for g, size in zip(grads, ctx.sizes, strict=True)]
        parts = [torch.cat([whole[block] for block in group], -1).to(moves.dtype) for group in ctx.groups if group]
        grad = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        of_delta = grad @ moves if ctx.needs_input_grad[1] else None
        of_scales = (sum_of_outer(grad, delta) if grad.dim() > 1 else torch.outer(grad, delta)).mul_(factor)
        order = [block for group in ctx.groups for block in group]
        blocks = dict(zip(order, of_scales.split([ctx.sizes[block] for block in order]), strict=True))
        torch._foreach_sub_(*([blocks[pair[side]] for pair in ctx.pairs] for side in (0, 1)))
        if order != sorted(order):
            of_scales = torch.cat([blocks[block] for block in sorted(order)])
        return of_scales, of_delta, *[None] * (4 + len(ctx.pairs))


def sum_of_outer(rows: Tensor, delta: Tensor) -> Tensor:
    """Σ_i r_i ⊗ δ_i, (N, h), of rows r (batch, N) and δ (batch, h).

    With a few columns, a library for CPUs takes a fourth of the time for the transpose.
    """
    return rows.T @ delta if rows.is_cuda else (delta.T @ rows).T.contiguous()


def channel_sums(
    grad: Tensor, output: Tensor, shape: torch.Size, both: bool, ends: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(Σ grad ⊙ output, Σ grad) over the axes along which a `shape` that broadcasts with both has one entry.

    both: whether the second is asked for.
    ends: (0, 1), or None.

    Where these axes are the last ones, one kernel sums both at once.
    """
    leading = next((i for i, (n, m) in enumerate(zip(shape, output.shape, strict=True)) if n != m), output.dim())
    rows, size = math.prod(shape[:leading]), math.prod(output.shape[leading:])
    fused = grad.is_contiguous() and output.is_contiguous() and grad.dtype == output.dtype
    fused = fused and not grad.is_complex()
    if size == 1 or torch.is_grad_enabled() or not fused or math.prod(shape) != rows or not grad.numel():
        products = (grad * output).sum_to_size(shape)
        return products, _total(grad, shape, products.dtype) if both else None
    products, sums = row_sums(grad, output, rows, both, zero_and_one(grad) if ends is None else ends)
    return products.view(shape), sums.view(shape) if both else None


def row_sums(a: Tensor, b: Tensor, rows: int, both: bool, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ a ⊙ b, Σ a) of each row, (rows,), in one pass over the two.

    a, b: contiguous, of one type, as so many rows.
    both: whether the second is asked for.
    ends: (0, 1).

    It is the backward kernel of group norm, at mean 0 and deviation 1, for which every row is a channel.
    """
    zero, one = ends.to(a.dtype).view(2, 1, 1)
    kernel = torch.ops.aten.native_group_norm_backward
    unread = a.new_empty(rows)  # a gain, of which only the sizes count
    _, products, sums = kernel(a, b, zero, one, unread, 1, rows, a.numel() // rows, 1, [False, True, both])
    return products, sums


def _total(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The sum to a shape with as many axes, in a type that is not narrower than that of the operand."""
    axes = [axis for axis, (n, m) in enumerate(zip(shape, grad.shape, strict=True)) if n != m]
    return grad.sum(axes, keepdim=True, dtype=dtype) if axes else grad.to(dtype)
