"""Sums over the entries that each row of U scales, and Θᵀ g for the gradients g of a network's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxstn.ops.precision import widen
from fxstn.ops.response import ResponseTree, responses_in


def row_products(
    tree: nn.Module,
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    metric: Callable[[str], Tensor | None] | None = None,
) -> Tensor:
    """For each row of U the sum of a ⊙ b, or of D ⊙ a ⊙ b, over the entries that it scales.

    tree: a ResponseTree, over the names of the model's parameters.
    left: {parameter name: a}, shaped like the parameter; one without counts as zero. They may be sparse.
    right: {parameter name: b}, for every name of `left` that responds.
    metric: parameter name → D, shaped like the parameter; None for D = 1.

    Returns (N,), in the type of U, differentiable in a and b.
    """
    assert isinstance(tree, ResponseTree)
    responses = {name: response for name, response in responses_in(tree).items() if name in left}
    sums: dict[int, Tensor] = {}
    pending: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, products: Tensor) -> None:
        response = responses[name]
        others = [axis for axis in range(products.dim()) if axis != response.axis]
        total = products.sum(others) if others else products
        total = total.to_dense() if total.is_sparse else total
        sums[response.block] = sums[response.block] + total if response.block in sums else total

    for name in responses:
        a, b = widen(left[name]), widen(right[name])
        if a.is_sparse:
            add(name, a * b)
        else:  # Re(ā b), as everywhere the derivative along a complex direction
            pending[name] = (torch.view_as_real(a), torch.view_as_real(b)) if a.is_complex() else (a, b)
    for names in _groups({name: a.numel() for name, (a, _) in pending.items()}):
        products = torch._foreach_mul([pending[name][0] for name in names], [pending[name][1] for name in names])
        for name, product in zip(names, products, strict=True):
            diagonal = None if metric is None else metric(name)
            add(name, product if diagonal is None else product * diagonal)
        del products
    U = tree.flat_U
    blocks = enumerate(tree.flat_sizes)
    return torch.cat([sums[i] if i in sums else U.new_zeros(size) for i, size in blocks]).to(U.dtype)


@torch.no_grad()
def pulled_back(tree: nn.Module, gradients: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """Θᵀ g = Uᵀ q, (h,), with the row sums q of g ⊙ R.

    tree: a ResponseTree, over the names of the model's parameters.
    gradients: {name: g}; a parameter without one counts as zero. They may be sparse.
    """
    assert isinstance(tree, ResponseTree)
    return tree.flat_U.T @ row_products(tree, gradients, directions(tree, model))


def directions(tree: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: R} of those that respond."""
    return {name: response.direction(model.get_parameter(name)) for name, response in responses_in(tree).items()}


def gradients_in(model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: .grad} of those that have one."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups, none of a larger size in all than the largest single one."""
    most, result, rest = max(sizes.values(), default=0), list[list[str]](), 0
    for name, size in sizes.items():
        if size > rest:
            result.append([])
            rest = most
        result[-1].append(name)
        rest -= size
    return result
