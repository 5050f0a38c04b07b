"""Penalties on the weights, in closed form on the structured response, and on the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxstn.ir.containers import leaves
from fxstn.ops.precision import real, wide, widen
from fxstn.ops.response import responses_in, row_scales


class _Penalty(torch.autograd.Function):
    """½ λ Σ ‖w‖², or λ Σ ‖w‖₁ for norm 1, by multi-tensor operations."""

    @staticmethod
    def forward(ctx: Any, strength: Tensor, norm: int, *weights: Tensor) -> Tensor:
        sizes = torch.stack(torch._foreach_norm(weights, norm, dtype=wide(weights[0].dtype)))
        size = sizes.sum() if norm == 1 else 0.5 * sizes.square().sum()
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
    directions = [weight.sgn() for weight in weights] if norm == 1 else list(weights)
    return list(torch._foreach_mul(directions, strength.to(weights[0].dtype)))


Groups = dict[tuple[int, int, torch.dtype], list[str]]  # (index of the strength, norm, type) → names of parameters


def groups_of(penalties: Sequence[tuple[str, int, int]], model: nn.Module) -> Groups:
    """The penalised parameters that one multi-tensor operation can take.

    penalties: (parameter name, index of its strength, norm) of each.
    """
    groups: Groups = {}
    for name, index, norm in penalties:
        groups.setdefault((index, norm, model.get_parameter(name).dtype), []).append(name)
    return groups


@torch.no_grad()
def add_decay(penalties: Sequence[tuple[str, int, int]], model: nn.Module, strengths: Tensor) -> None:
    """Add the gradient of each penalty at w to that of its parameter, unless it is frozen.

    penalties: (parameter name, index of its strength, norm) of each.
    strengths: (h,).
    """
    for (index, norm, _), names in groups_of(penalties, model).items():
        if weights := [w for w in map(model.get_parameter, names) if w.requires_grad]:
            add_to_gradients(weights, penalty_gradients(weights, strengths[index], norm))


@torch.no_grad()
def add_to_gradients(weights: Sequence[nn.Parameter], changes: Sequence[Tensor]) -> None:
    """Add a dense tensor to the gradient of each weight: dense, sparse or none."""
    dense = [(w.grad, change) for w, change in zip(weights, changes, strict=True)
             if w.grad is not None and not w.grad.is_sparse]  # fmt: skip
    if dense:
        torch._foreach_add_([gradient for gradient, _ in dense], [change for _, change in dense])
    for weight, change in zip(weights, changes, strict=True):
        if weight.grad is None or weight.grad.is_sparse:
            weight.grad = change if weight.grad is None else change.add_(weight.grad)


def penalty_perturbed(
    weight: Tensor, strength: Tensor, scale: Tensor, response: Tensor, axis: int = 0, norm: int = 2
) -> Tensor:
    """Mean over the batch of the penalty at w + s_i ⊙row R, without per-example weights.

    Norm 2 uses ‖W_r + s_r R_r‖² = ‖W_r‖² + 2 s_r ⟨W_r, R_r⟩ + s_r² ‖R_r‖² per row r. Norm 1 is linearised at w, which is
    exact until an entry changes its sign: ‖W_r‖₁ + s_r ⟨sign W_r, R_r⟩.

    weight, response: of one shape.
    strength: λ ≥ 0, 0-d or (batch,).
    scale: (rows,) or (batch, rows), scales s_i along `axis`.
    norm: 1 or 2.

    Returns a scalar.
    """
    w, r = (widen(value).movedim(axis, 0).flatten(1) for value in (weight, response))
    if norm == 1:
        return (strength * (w.abs().sum() + scale @ torch.linalg.vecdot(w.sign(), r))).mean()
    cross, square = torch.linalg.vecdot(w, r), torch.linalg.vecdot(r, r)
    norms = torch.linalg.vecdot(w, w).sum() + 2 * scale @ cross + scale.square() @ square
    return 0.5 * (strength * norms).mean()


def total_penalty(
    penalties: Sequence[tuple[str, int, int]],
    model: nn.Module,
    tree: nn.Module,
    strengths: Tensor,
    delta: Tensor | None,
    constant: bool,
    metric: Callable[[str], Tensor | None] | None = None,
) -> Tensor:
    """The sum of the penalties of several parameters, the mean over the batch.

    penalties: (parameter name, index of its strength, norm) of each.
    tree: the Response modules of the model's parameters.
    strengths: (h,) or (batch, h).
    delta: (h,) or (batch, h), how far the weights move by their response; None for the weights as they are.
    constant: whether the weights themselves get no gradient.
    metric: parameter name → D, shaped like the weight, where its penalty of norm 2 is ½ λ wᵀ D w with this diagonal D; or None.
    """
    total, responses = strengths.new_zeros(()), responses_in(tree)
    if delta is None and metric is None:
        for (index, norm, _), names in groups_of(penalties, model).items():
            total = total + penalty([model.get_parameter(name) for name in names], strengths[..., index].mean(), norm)
        return total
    scales = {} if delta is None else row_scales(tree, delta)
    for name, index, norm in penalties:
        response, weight = responses.get(name), model.get_parameter(name)
        w = weight.detach() if constant else weight
        direction = None if delta is None or response is None else response.direction(w)
        if norm == 2 and metric is not None and (diagonal := metric(name)) is not None:
            root = diagonal.sqrt()  # ‖√D w‖²
            w, direction = w * root, None if direction is None else direction * root
        if delta is None or response is None or direction is None:
            total = total + penalty([w], strengths[..., index].mean(), norm)
        else:
            scale = scales[name].to(wide(real(weight.dtype)))
            total = total + penalty_perturbed(w, strengths[..., index], scale, direction, response.axis, norm)
    return total


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
