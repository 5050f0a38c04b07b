"""Θᵀ g for the gradients g of a network's parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxstn.ops.precision import widen
from fxstn.ops.response import ResponseTree, responses_in


@torch.no_grad()
def row_products(tree: nn.Module, gradients: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """q: for each row of U the sum of g ⊙ R over the entries that it scales, so that Θᵀ g = Uᵀ q.

    tree: a ResponseTree, over the names of the model's parameters.
    gradients: {name: g}; a parameter without one counts as zero. They may be sparse.

    Returns (N,), in the type of U.
    """
    assert isinstance(tree, ResponseTree)
    responses = {name: response for name, response in responses_in(tree).items() if name in gradients}
    sums: dict[int, Tensor] = {}
    pending: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, products: Tensor) -> None:
        response = responses[name]
        others = [axis for axis in range(products.dim()) if axis != response.axis]
        total = products.sum(others) if others else products
        total = total.to_dense() if total.is_sparse else total
        sums[response.block] = sums[response.block] + total if response.block in sums else total

    for name, response in responses.items():
        g, direction = widen(gradients[name]), response.direction(model.get_parameter(name))
        if g.is_sparse:
            add(name, g * direction)
        else:  # Re(ḡ R), as everywhere the derivative along a complex direction
            pending[name] = (torch.view_as_real(g), torch.view_as_real(direction)) if g.is_complex() else (g, direction)
    for names in _groups({name: g.numel() for name, (g, _) in pending.items()}):
        products = torch._foreach_mul([pending[name][0] for name in names], [pending[name][1] for name in names])
        for name, product in zip(names, products, strict=True):
            add(name, product)
        del products
    U = tree.flat_U
    blocks = enumerate(tree.flat_sizes)
    return torch.cat([sums[i] if i in sums else U.new_zeros(size) for i, size in blocks]).to(U.dtype)


@torch.no_grad()
def pulled_back(tree: nn.Module, gradients: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """Θᵀ g, (h,), for gradients g of the model's parameters. Arguments as in `row_products`."""
    assert isinstance(tree, ResponseTree)
    return tree.flat_U.T @ row_products(tree, gradients, model)


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
