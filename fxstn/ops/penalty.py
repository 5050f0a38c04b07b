"""Penalties on the weights, in closed form on the structured response, and on the Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from fxstn.ir.containers import leaves
from fxstn.ops.multi_tensor import add_multiples
from fxstn.ops.penalty_rows import parts_without_conflict, penalty_of_rows
from fxstn.ops.precision import as_real, real, wide, widen, without_autocast
from fxstn.ops.pull_back import Metric
from fxstn.ops.response import ResponseTree, parameters_in, responses_in


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
def add_decay(
    penalties: Sequence[tuple[str, int, int]], parameters: Mapping[str, nn.Parameter], strengths: Tensor
) -> None:
    """Add the gradient of each penalty at w to that of its parameter, unless it is frozen.

    penalties: (parameter name, index of its strength, norm) of each.
    parameters: of the model, {name: w}.
    strengths: (h,).
    """
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
        for part in parts_without_conflict([one for one in penalties if one[0] in responses], responses):
            own = {name: weight(name) for name in part.names}
            with without_autocast(delta.device.type):
                terms.append(penalty_of_rows(part, own, tree, strengths, delta, metric))
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


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
