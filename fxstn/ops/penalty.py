"""Penalties on the weights, in closed form on the structured response, and on the Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from fxstn.ir.containers import leaves
from fxstn.ops.multi_tensor import add_multiples
from fxstn.ops.precision import as_real, real, wide, widen, without_autocast
from fxstn.ops.pull_back import Metric, row_products
from fxstn.ops.response import Response, ResponseTree, parameters_in, responses_in
from fxstn.ops.scaled import sum_of_outer


class _Penalty(torch.autograd.Function):
    """½ λ Σ ‖w‖², or λ Σ ‖w‖₁ for norm 1, by multi-tensor operations."""

    @staticmethod
    def forward(ctx: Any, strength: Tensor, norm: int, *weights: Tensor) -> Tensor:
        sizes = torch.stack(torch._foreach_norm(weights, norm, dtype=wide(weights[0].dtype)))
        size = sizes.sum() if norm == 1 else 0.5 * torch.dot(sizes, sizes)
        ctx.save_for_backward(strength, size, *weights)
        ctx.norm = norm
        return strength * size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        strength, size, *weights = ctx.saved_tensors
        of_strength = gradient * size if ctx.needs_input_grad[0] else None
        return of_strength, None, *penalty_gradients(weights, gradient * strength, ctx.norm)


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


def penalty(weights: Sequence[Tensor], strength: Tensor, norm: int = 2) -> Tensor:
    """½ λ Σ ‖w‖², or λ Σ ‖w‖₁ for norm 1, a scalar at least in float32.

    weights: of any shapes, and of one type.
    strength: λ ≥ 0, 0-d.

    Its gradient in w is λ w to the last bit, as an optimizer's own weight decay has it.
    """
    return _Penalty.apply(strength.to(real(wide(weights[0].dtype))), norm, *weights)


def penalty_gradients(weights: Sequence[Tensor], strength: Tensor, norm: int = 2) -> list[Tensor]:
    """λ w, or λ sign(w) for norm 1, of each weight.

    weights: of one type.
    strength: λ, 0-d.
    """
    return list(torch._foreach_mul(_directions(weights, norm), strength.to(weights[0].dtype)))


def _directions(weights: Sequence[Tensor], norm: int) -> list[Tensor]:
    """∂(½ ‖w‖²)/∂w, or ∂‖w‖₁/∂w for norm 1."""
    return [weight.sgn() for weight in weights] if norm == 1 else list(weights)


Groups = dict[tuple[int, int, torch.dtype], list[str]]  # (index of the strength, norm, type) → names of parameters


def groups_of(penalties: Sequence[tuple[str, int, int]], parameters: Mapping[str, nn.Parameter]) -> Groups:
    """The penalised parameters that one multi-tensor operation can take.

    penalties: (parameter name, index of its strength, norm) of each.
    parameters: of the model.
    """
    groups: Groups = {}
    for name, index, norm in penalties:
        groups.setdefault((index, norm, parameters[name].dtype), []).append(name)
    return groups


@torch.no_grad()
def add_decay(penalties: Sequence[tuple[str, int, int]], model: nn.Module, strengths: Tensor) -> None:
    """Add the gradient of each penalty at w to that of its parameter, unless it is frozen.

    penalties: (parameter name, index of its strength, norm) of each.
    strengths: (h,).
    """
    parameters = parameters_in(model)
    for (index, norm, _), names in groups_of(penalties, parameters).items():
        if weights := [w for w in map(parameters.__getitem__, names) if w.requires_grad]:
            add_to_gradients(weights, strengths[index], norm)


@torch.no_grad()
def add_to_gradients(weights: Sequence[nn.Parameter], strength: Tensor, norm: int = 2) -> None:
    """Add λ w, or λ sign(w) for norm 1, to the gradient of each weight: dense, sparse or none.

    weights: of one type.
    strength: λ, 0-d.
    """
    dense = [w for w in weights if w.grad is not None and not w.grad.is_sparse]
    others = [w for w in weights if w.grad is None or w.grad.is_sparse]
    if dense:
        add_multiples([w.grad for w in dense if w.grad is not None], _directions(dense, norm), strength)
    for weight, change in zip(others, penalty_gradients(others, strength, norm) if others else (), strict=True):
        weight.grad = change if weight.grad is None else change.add_(weight.grad)


def total_penalty(
    penalties: Sequence[tuple[str, int, int]],
    model: nn.Module,
    tree: nn.Module,
    strengths: Tensor,
    delta: Tensor | None,
    constant: bool,
    metric: Metric | None = None,
) -> Tensor:
    """The sum of the penalties of several parameters, the mean over the batch, without weights per example.

    penalties: (parameter name, index of its strength, norm) of each; at least one.
    tree: the ResponseTree of the model's parameters.
    strengths: (h,) or (batch, h).
    delta: (h,) or (batch, h), how far the weights move by their response; None for the weights as they are.
    constant: whether the weights themselves get no gradient.
    metric: names of parameters → {name: D}, shaped like `as_real` of the weight, of those whose penalty of norm 2 is ½ λ wᵀ D w
        with this diagonal D.
    """
    parameters = parameters_in(model)

    def weight(name: str) -> Tensor:
        return parameters[name].detach() if constant else parameters[name]

    responses = {} if delta is None else responses_in(tree)
    terms: list[Tensor] = []
    others = [one for one in penalties if one[0] not in responses]
    for (index, norm, _), names in groups_of(others, parameters).items():
        weights = [weight(name) for name in names]
        if norm == 2 and metric is not None and (diagonals := metric(names)):
            shown = zip(names, as_real(weights), strict=True)
            weights = [w * diagonals[n].sqrt() if n in diagonals else w for n, w in shown]
        terms.append(penalty(weights, strengths[index] if strengths.dim() == 1 else strengths[:, index].mean(), norm))
    if delta is not None and responses:
        assert isinstance(tree, ResponseTree)
        for part in _without_conflict([one for one in penalties if one[0] in responses], responses):
            own = {name: weight(name) for name in part.names}
            with without_autocast(delta.device.type):
                terms.append(_penalty_of_rows(part, own, tree, strengths, delta, metric))
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


@dataclass
class _Part:
    """Penalties of one norm, such that all parameters that share a block of scales have one strength.

    indices: {block: index of its strength}.
    """

    norm: int
    names: list[str] = field(default_factory=list)
    indices: dict[int, int] = field(default_factory=dict)


def _without_conflict(penalties: Sequence[tuple[str, int, int]], responses: dict[str, Response]) -> list[_Part]:
    parts: list[_Part] = []
    for name, index, norm in penalties:
        block = responses[name].block
        free = (p for p in parts if p.norm == norm and name not in p.names and p.indices.get(block, index) == index)
        if (part := next(free, None)) is None:
            parts.append(part := _Part(norm))
        part.names.append(name)
        part.indices[block] = index
    return parts


def _penalty_of_rows(
    part: _Part,
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
    responses = {name: response for name, response in responses_in(tree).items() if name in weights}
    sums = partial(row_products, tree, metric=metric if part.norm == 2 else None)
    left = {name: w.sgn() for name, w in weights.items()} if part.norm == 1 else weights
    own = sums(left, weights)
    scaled = all(response.R is None for response in responses.values())  # R is w
    indices = set(part.indices.values())
    if scaled and part.norm == 2 and len(indices) == 1 and not (own.requires_grad or delta.requires_grad):
        result: Tensor = _ScaledPenalty.apply(tree.flat_U, own, strengths[..., indices.pop()], delta)
        return result
    scales = tree.flat_scales(delta)
    if scaled:
        rows = own * (1 + scales) if part.norm == 1 else 0.5 * own * (1 + scales).square()
    else:
        directions = {name: response.direction(weights[name]) for name, response in responses.items()}
        change = scales * sums(left, directions)
        if part.norm == 2:
            change = change + 0.5 * scales.square() * sums(directions, directions)
        rows = own / part.norm + change
    each = [strengths[..., part.indices.get(block, 0), None] for block in range(len(tree.flat_sizes))]
    sizes = tree.flat_sizes
    strength = torch.cat([one.expand(*one.shape[:-1], n) for one, n in zip(each, sizes, strict=True)], -1)
    return (strength.to(rows.dtype) * rows).sum(-1).mean()


def twice_differentiable(needed: bool) -> AbstractContextManager[None]:
    """Attention by products and a softmax, where that is needed: its fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def squared_jacobian(output: object, inputs: object, projections: int | None) -> Tensor:
    """‖∂y_i/∂x‖², the squared Frobenius norm, of each example i, to be differentiated again.

    Where examples see each other (batch norm in train mode) row i also has what x_i does to the others.

    output: (batch, ...), or a structure of such.
    inputs: a structure of tensors (batch, ...); those that require no gradient are passed over.
    projections: number of vectors of random signs, whose mean is an unbiased estimate. None: exact, by a backward pass for
        each entry of the output.

    Returns (batch,).

    Raises ValueError without floating point inputs or outputs, RuntimeError where an operation has no second derivative.
    """
    sources = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    entries = [y for y in leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
    if not sources or not entries:
        raise ValueError("the Jacobian's norm needs floating point inputs and outputs, (batch, ...)")
    y = torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in entries], 1)
    if projections is None:
        directions = [one.expand_as(y) for one in torch.eye(y.shape[1], dtype=y.dtype, device=y.device)]
    else:
        directions = [torch.randint_like(y, 0, 2).mul_(2).sub_(1) for _ in range(projections)]
    total = y.new_zeros(len(y), dtype=wide(y.dtype))
    for u in directions:
        try:
            gradients = torch.autograd.grad(y, sources, u, create_graph=True, materialize_grads=True)
        except RuntimeError as error:
            raise RuntimeError(f"hp.JacobianNorm differentiates the output by the inputs, twice: {error}") from error
        total = total + sum(widen(gradient).square().flatten(1).sum(1) for gradient in gradients)
    return total / (len(directions) if projections is not None else 1)
