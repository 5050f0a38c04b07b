"""Sums over the entries that each row of U scales, and Θᵀ g for the gradients g of a network's parameters, or of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxstn.ops.linear_maps import Context
from fxstn.ops.precision import as_real, widen
from fxstn.ops.response import ResponseTree, responding, responses_in
from fxstn.ops.scaled import row_sums, zero_and_one

SMALL = 2**22  # entries: 16 MB of float32
BLOCK = 2**19  # entries whose products stay in a CPU's cache
Metric = Callable[[Sequence[str]], Mapping[str, Tensor]]


def row_products(
    tree: nn.Module,
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    metric: Metric | None = None,
) -> Tensor:
    """For each row of U the sum of a ⊙ b, or of D ⊙ a ⊙ b, over the entries that it scales.

    tree: a ResponseTree, over the names of the model's parameters.
    left: {parameter name: a}, shaped like the parameter; one without counts as zero. They may be sparse.
    right: {parameter name: b}, for every name of `left` that responds.
    metric: names of parameters → {name: D}, shaped like `as_real` of the parameter; D is 1 for a name without one.

    Returns (N,), in the type of U, differentiable in a and b.
    """
    assert isinstance(tree, ResponseTree)
    responses = {name: response for name, response in responses_in(tree).items() if name in left}
    sums: dict[int, Tensor] = {}
    pending: dict[str, tuple[Tensor, Tensor]] = {}
    vectors: dict[str, tuple[Tensor, Tensor]] = {}  # most of a network with norms: nothing more is asked of each alone
    dtype, ends = tree.flat_U.dtype, None

    def add(name: str, total: Tensor) -> None:
        block = responses[name].block
        sums[block] = sums[block] + total if block in sums else total

    for name, response in responses.items():
        a, b, by_rows = left[name], right[name], metric is None and response.axis == 0
        if by_rows and a.dim() == 1 and a.layout is torch.strided and a.dtype is b.dtype is dtype:
            vectors[name] = a, b
            continue
        a, b = widen(a), widen(b)
        if a.is_sparse:
            add(name, _over_rows(a * b, response.axis).to_dense().reshape(-1))
        elif by_rows and a.is_cuda and _in_one_pass(a, b):
            ends = zero_and_one(a) if ends is None else ends
            add(name, row_sums(a, b, len(a), False, ends)[0])
        elif by_rows and a.is_cpu and _in_one_pass(a, b):
            add(name, _row_sums_in_blocks(a, b))
        else:  # Re(ā b), as everywhere the derivative along a complex direction
            a, b = as_real((a, b))
            pending[name] = (a, b)
    for name, product in _products(vectors).items():
        add(name, product)
    for names in _groups({name: a.numel() for name, (a, _) in pending.items()}):
        products = _products({name: pending[name] for name in names})
        for name, product in zip(names, with_metric(names, [*products.values()], metric), strict=True):
            add(name, _over_rows(product, responses[name].axis).reshape(-1))
        del products
    return _in_order(tree, sums)


def _products(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """{name: a ⊙ b}."""
    if not pairs:
        return {}
    return dict(zip(pairs, torch._foreach_mul(*map(list, zip(*pairs.values(), strict=True))), strict=True))


def _in_order(tree: ResponseTree, sums: Mapping[int, Tensor]) -> Tensor:
    """Values of the rows of some blocks, {block: (rows,)}, as those of all, (N,); others are 0."""
    if len(sums) < len(tree.flat_sizes):  # one kernel writes the zeros of all blocks without a sum
        zeros = tree.flat_U.new_zeros(max(size for block, size in enumerate(tree.flat_sizes) if block not in sums))
    parts = [sums[block] if block in sums else zeros[:size] for block, size in enumerate(tree.flat_sizes)]
    return torch.cat(parts).to(tree.flat_U.dtype)


def _over_rows(products: Tensor, axis: int) -> Tensor:
    """The sum over all axes but one."""
    others = [other for other in range(products.dim()) if other != axis]
    return products.sum(others) if others else products


def _in_one_pass(a: Tensor, b: Tensor) -> bool:
    """Whether the products need not all be kept: nothing is differentiated, and rows lie one after the other."""
    constant = not torch.is_grad_enabled() or not (a.requires_grad or b.requires_grad)
    dense = a.dim() > 1 and a.numel() > 0 and a.is_contiguous() and b.is_contiguous()
    return constant and dense and a.dtype == b.dtype and a.is_floating_point()


def _row_sums_in_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ⊙ b of each row, (rows,). Products of a block of rows stay in the cache: memory is read once, and not written.

    `row_sums` reads once, too, but on the CPU its product has less than the accuracy of a sum.
    """
    rows = max(1, BLOCK // (a.numel() // len(a)))
    if rows >= len(a):
        return _over_rows(a * b, 0)
    sums = [_over_rows(one * other, 0) for one, other in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(sums)


def with_metric(names: Sequence[str], values: Sequence[Tensor], metric: Metric | None) -> list[Tensor]:
    """D ⊙ a of each value a. Arguments as in `row_products`."""
    diagonals = {} if metric is None else metric(names)
    if not diagonals:
        return list(values)
    own = [number for number, name in enumerate(names) if name in diagonals]
    products = torch._foreach_mul([values[number] for number in own], [diagonals[names[number]] for number in own])
    scaled = dict(zip(own, products, strict=True))
    return [scaled.get(number, value) for number, value in enumerate(values)]


@torch.no_grad()
def pull_back(tree: nn.Module, gradients: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Θᵀ g = Uᵀ q, (h,), with the row sums q of g ⊙ R.

    tree: a ResponseTree, over the names of the model's parameters.
    gradients: {name: g}; a parameter without one counts as zero. They may be sparse.
    parameters: {name: w}, with every name of `gradients`.
    """
    assert isinstance(tree, ResponseTree)
    responses = responses_in(tree)
    directions = {name: responses[name].direction(parameters[name]) for name in gradients if name in responses}
    return tree.flat_U.T @ row_products(tree, gradients, directions)


def pull_back_gradients(tree: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Θᵀ g, (h,), for the gradients g that the parameters hold, {name: w} of a model."""
    gradients = {name: parameters[name].grad for name in responses_in(tree)}
    return pull_back(tree, {name: g for name, g in gradients.items() if g is not None}, parameters)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups, none of a larger size in all than the largest single one, or than what is no matter."""
    result: list[list[str]] = []
    most, rest = max(SMALL, *sizes.values(), 0), 0
    for name, size in sizes.items():
        if size > rest:
            result.append([])
            rest = most
        result[-1].append(name)
        rest -= size
    return result


class _ThroughResponse(torch.autograd.Function):
    """The loss itself, with the gradient Θᵀ ∇L in λ, and what it has in λ besides."""

    @staticmethod
    def forward(
        ctx: Context,
        unconstrained: Tensor,
        record: Sequence[Tensor],
        tree: nn.Module,
        parameters: Mapping[str, nn.Parameter],
    ) -> Tensor:
        (loss,) = record  # in a sequence it is no input of this function: its record stays apart
        ctx.unconstrained, ctx.loss, ctx.tree, ctx.parameters = unconstrained, loss, tree, parameters
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parameters = responding(ctx.tree, ctx.parameters)
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        with without_hooks(parameters.values()):
            sources = (ctx.unconstrained, *parameters.values())
            own, *gradients = torch.autograd.grad(ctx.loss, sources, gradient, retain_graph=keeps, allow_unused=True)
        of_weights = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        result = pull_back(ctx.tree, of_weights, parameters).to(ctx.unconstrained)
        return result if own is None else result + own, None, None, None


def through_response(
    loss: Tensor, unconstrained: Tensor, tree: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    """A loss of the network itself as a function of λ: the weights move by Θ δ, δ = λ − λ₀ = 0.

    Its gradient in λ is that of L(f(w₀ + Θδ)), Θᵀ ∇L: the loss's own backward pass and one product. No other gradient is left
    anywhere, and no hook on a parameter runs.

    loss: a scalar, whose record leads to the parameters that respond.
    unconstrained: λ, (h,).
    tree: a ResponseTree, over the names of the model's parameters.
    parameters: these, {name: w}.
    """
    result: Tensor = _ThroughResponse.apply(unconstrained, [loss], tree, parameters)
    return result


@contextmanager
def without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters have no hooks on their gradients."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own
