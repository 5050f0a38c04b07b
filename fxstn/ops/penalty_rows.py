"""Penalties on weights that move by their response, from sums over the entries of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxstn.ops.pull_back import Metric, row_products
from fxstn.ops.response import Response, ResponseTree, responses_in
from fxstn.ops.scaled import sum_of_outer


class _ScaledPenalty(torch.autograd.Function):
    """½ mean_i λ_i Σ_r q_r (1 + U_r δ_i)², with its gradient mean_i λ_i q_r (1 + U_r δ_i) δ_i in U_r."""

    @staticmethod
    def forward(ctx: Any, flat_U: Tensor, squares: Tensor, strengths: Tensor, delta: Tensor) -> Tensor:
        """flat_U: (N, h). squares: q, (N,). strengths: λ, () or (batch,). delta: (h,) or (batch, h)."""
        delta = delta.to(flat_U.dtype).reshape(-1, delta.shape[-1])
        factors = torch.nn.functional.linear(delta, flat_U).add_(1)
        shares = (strengths.to(flat_U.dtype).reshape(-1, 1) / len(delta)) * squares
        shares.mul_(factors)
        ctx.save_for_backward(shares, delta)
        return 0.5 * torch.dot(shares.flatten(), factors.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        shares, delta = ctx.saved_tensors
        return sum_of_outer(shares, delta).mul_(grads[0]), None, None, None


class _StructuredPenalty(torch.autograd.Function):
    """½ mean_i λ_i Σ ‖w + s_i ⊙row R‖² with s_i = U δ_i, from the sums over rows ⟨w, R⟩ and ‖R‖² and the norm of all w.

    With a = mean_i λ_i s_i and b = mean_i λ_i s_i² its gradient in R is a ⊙row w + b ⊙row R.
    """

    @staticmethod
    def forward(
        ctx: Any,
        flat_U: Tensor,
        strengths: Tensor,
        delta: Tensor,
        tree: nn.Module,
        weights: dict[str, Tensor],
        *directions: Tensor,
    ) -> Tensor:
        """strengths: λ, () or (batch,). delta: (h,) or (batch, h). directions: R of each of the weights, in their order."""
        own = dict(zip(weights, directions, strict=True))
        cross, squares = row_products(tree, weights, own), row_products(tree, own, own)
        delta = delta.to(flat_U.dtype).reshape(-1, delta.shape[-1])
        scales = torch.nn.functional.linear(delta, flat_U)
        shares = (strengths.to(flat_U.dtype).reshape(-1, 1) / len(delta)).expand(len(delta), 1)
        moved = shares * scales
        first, second = moved.sum(0), (moved * scales).sum(0)
        sizes = torch.stack(torch._foreach_norm(list(weights.values()), 2, dtype=squares.dtype))
        ctx.save_for_backward(cross, squares, delta, shares, moved, first, second)
        ctx.tree, ctx.own, ctx.weights = tree, own, weights
        return 0.5 * (shares.sum() * torch.dot(sizes, sizes) + torch.dot(second, squares)) + torch.dot(first, cross)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cross, squares, delta, shares, moved, first, second = ctx.saved_tensors
        of_scales = torch.outer(cross, (shares * delta).sum(0)).addcmul_(squares[:, None], sum_of_outer(moved, delta))
        responses = responses_in(ctx.tree)
        blocks = [(grads[0] * rows).split(ctx.tree.flat_sizes) for rows in (first, second)]
        of_directions = []
        for (name, weight), direction in zip(ctx.weights.items(), ctx.own.values(), strict=True):
            response = responses[name]
            a, b = (_along(part[response.block], response.axis, direction) for part in blocks)
            of_directions.append((direction * b).addcmul_(weight.to(direction.dtype), a))
        return of_scales.mul_(grads[0]), None, None, None, None, *of_directions


def _along(rows: Tensor, axis: int, like: Tensor) -> Tensor:
    """Rows, or one for a WHOLE parameter, as a tensor that broadcasts along an axis."""
    return rows.view([-1 if i == axis else 1 for i in range(like.dim())])


@dataclass
class Part:
    """Penalties of one norm, such that all parameters that share a block of scales have one strength.

    indices: {block: index of its strength}.
    """

    norm: int
    names: list[str] = field(default_factory=list)
    indices: dict[int, int] = field(default_factory=dict)


def parts_without_conflict(penalties: Sequence[tuple[str, int, int]], responses: dict[str, Response]) -> list[Part]:
    """The fewest parts, in the order of the penalties.

    penalties: (parameter name, index of its strength, norm) of each.
    responses: {parameter name: its response}.
    """
    parts: list[Part] = []
    for name, index, norm in penalties:
        block = responses[name].block
        free = (p for p in parts if p.norm == norm and name not in p.names and p.indices.get(block, index) == index)
        if (part := next(free, None)) is None:
            parts.append(part := Part(norm))
        part.names.append(name)
        part.indices[block] = index
    return parts


def penalty_of_rows(
    part: Part,
    weights: dict[str, Tensor],
    tree: nn.Module,
    strengths: Tensor,
    delta: Tensor,
    metric: Metric | None,
) -> Tensor:
    """Mean over the batch of the penalties at w + s_i ⊙row R, from sums over rows.

    Norm 2 uses ‖W_r + s_r R_r‖² = ‖W_r‖² + 2 s_r ⟨W_r, R_r⟩ + s_r² ‖R_r‖² per row r, with D in each product where there is
    one. Norm 1 is linearised at w, which is exact until an entry changes its sign: ‖W_r‖₁ + s_r ⟨sign W_r, R_r⟩.

    weights: {parameter name: w}.
    strengths, delta: (h,) or (batch, h).
    """
    assert isinstance(tree, ResponseTree)
    own = [(name, response.R) for name, response in responses_in(tree).items() if name in weights]
    directions = {name: direction for name, direction in own if direction is not None}  # those of the others are w
    constant = not (torch.is_grad_enabled() and any(x.requires_grad for x in (delta, *weights.values())))
    result: Tensor | None = None
    if part.norm == 2 and len(set(part.indices.values())) == 1 and constant:
        strength = strengths[..., next(iter(part.indices.values()))]
        if not directions:
            squares = row_products(tree, weights, weights, metric)
            result = _ScaledPenalty.apply(tree.flat_U, squares, strength, delta)
        elif _are_alike(weights, directions) and metric is None and not torch.compiler.is_compiling():
            ordered = {name: weights[name] for name in directions}
            result = _StructuredPenalty.apply(tree.flat_U, strength, delta, tree, ordered, *directions.values())
    return _sum_over_rows(part, weights, directions, tree, strengths, delta, metric) if result is None else result


def _are_alike(weights: Mapping[str, Tensor], directions: Mapping[str, Tensor]) -> bool:
    """Whether each weight has an R, and all are of one real type."""
    types = {weight.dtype for weight in weights.values()}
    return weights.keys() == directions.keys() and len(types) == 1 and all(dtype.is_floating_point for dtype in types)


def _sum_over_rows(
    part: Part,
    weights: dict[str, Tensor],
    directions: Mapping[str, Tensor],
    tree: ResponseTree,
    strengths: Tensor,
    delta: Tensor,
    metric: Metric | None,
) -> Tensor:
    """`penalty_of_rows` in operations that autograd differentiates."""
    sums = partial(row_products, tree, metric=metric if part.norm == 2 else None)
    left = {name: w.sgn() for name, w in weights.items()} if part.norm == 1 else weights
    own, scales = sums(left, weights), tree.flat_scales(delta)
    if directions:
        moves = {name: directions.get(name, weight) for name, weight in weights.items()}
        change = scales * sums(left, moves)
        if part.norm == 2:
            change = change + 0.5 * scales.square() * sums(moves, moves)
        rows = own / part.norm + change
    else:
        rows = own * (1 + scales) if part.norm == 1 else 0.5 * own * (1 + scales).square()
    each = [strengths[..., part.indices.get(block, 0), None] for block in range(len(tree.flat_sizes))]
    sizes = tree.flat_sizes
    strength = torch.cat([one.expand(*one.shape[:-1], n) for one, n in zip(each, sizes, strict=True)], -1)
    return (strength.to(rows.dtype) * rows).sum(-1).mean()
