"""Response parameters of one weight or bias, and the products that use them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ops.batch_axis import expand_rows
from fxstn.ops.precision import WideModule, wide, widen


class Response(WideModule):
    """Response of one parameter w: Δw = (U δ) ⊙ R, scaled along `axis` (paper, Eq. 3.14: rows, axis 0).

    U: (n, h), n entries along `axis`. It starts at zero, so that a fresh response predicts no change. Parameters that w is
        combined with row by row share it.
    R: None where it is w itself, so that w(δ) = (1 + U δ) ⊙ w. Otherwise a parameter shaped like w, which starts from the
        uniform distribution of torch's linear and convolution layers, ±1/√fan_in.
    active: whether w responds. It does not while it is not trained.

    U and R are in the type of w, but float32 at least. A layer gets U δ in the type of its output, and R in that of w.
    """

    def __init__(
        self,
        parameter: Tensor,
        fan_in: int,
        hyperparameters: int,
        axis: int = 0,
        U: nn.Parameter | None = None,
        structured: bool = True,
    ) -> None:
        super().__init__()
        dtype, bound = wide(parameter.dtype), 1 / math.sqrt(fan_in)
        zeros = torch.zeros(parameter.shape[axis], hyperparameters, dtype=dtype, device=parameter.device)
        self.U = nn.Parameter(zeros) if U is None else U
        drawn = torch.empty_like(parameter, dtype=dtype).uniform_(-bound, bound) if structured else None
        self.R = None if drawn is None else nn.Parameter(drawn)
        self.axis = axis
        self.active = True

    def forward(self, delta: Tensor) -> Tensor:
        """Scales U δ: (n,) for delta (h,), (batch, n) for (batch, h)."""
        return nn.functional.linear(delta.to(self.U.dtype), self.U)

    def direction(self, parameter: Tensor) -> Tensor:
        """R, given w."""
        return parameter if self.R is None else self.R


def responses_in(tree: nn.Module) -> dict[str, Response]:
    """{parameter name: its response} of a tree of Response modules that mirrors the model's parameter names.

    Parameters that are not trained are left out.
    """
    return {name: child for name, child in tree.named_modules() if isinstance(child, Response) and child.active}


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters as constants: nothing computed inside records a gradient for them."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def parameter_changes(tree: nn.Module, model: nn.Module, delta: Tensor) -> dict[str, Tensor]:
    """{parameter name: Δw} for one delta, at least float32.

    tree: Response modules, under the names of the model's parameters.
    delta: (h,).
    """
    return {
        name: materialised(response(delta), widen(response.direction(model.get_parameter(name))), response.axis)
        for name, response in responses_in(tree).items()
    }


@torch.no_grad()
def pulled_back(tree: nn.Module, model: nn.Module) -> Tensor | float:
    """Θᵀ g for the gradients g of the model's parameters: Σ U.T · (rows of g · rows of R).

    tree: Response modules, under the names of the model's parameters.

    Returns (h,); 0.0 where no parameter has a gradient.
    """
    total: Tensor | float = 0.0
    for name, response in responses_in(tree).items():
        parameter = model.get_parameter(name)
        if parameter.grad is not None:
            products = widen(parameter.grad) * response.direction(parameter)
            total = total + _sums_along(products, response.axis) @ response.U
    return total


def _sums_along(products: Tensor, axis: int) -> Tensor:
    """(n,): sums over every axis but one. products: also sparse, as the gradient of a table with `sparse=True`."""
    if not products.is_sparse:
        return products.movedim(axis, 0).reshape(products.shape[axis], -1).sum(1)
    sums = torch.sparse.sum(products, [other for other in range(products.dim()) if other != axis])
    return sums.to_dense() if sums.is_sparse else sums


@staged
def materialised(scale: Tensor, response: Tensor, axis: int) -> Tensor:
    """response ⊙ scale along `axis`, for one perturbation of the whole batch.

    scale: (n,).
    response: a tensor with n entries along `axis`.

    Returns a tensor in the type of `response`. Raises ValueError for scales (batch, n).
    """
    if scale.dim() != 1:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)}, one row per example, cannot be multiplied into a weight"
        )
    return (response * scale.view([-1 if i == axis else 1 for i in range(response.dim())])).to(response.dtype)


def align(scale: Tensor, output: Tensor, dim: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
    """Scales so that they broadcast with `output`, in its type, which autocast may have lowered.

    scale: (n,), or (batch, n) with a row per example.
    output: a tensor with n channels.
    dim: its dimension of channels.
    batch_axis: where the examples are in `output`.

    Raises ValueError when the examples of a scale (batch, n) are not there.
    """
    scale = scale.to(output.dtype)
    shape = [1] * output.dim()
    shape[dim] = scale.shape[-1]
    if scale.dim() == 1:
        return scale.view(shape)
    axis, channel = batch_axis.axis, dim % output.dim()
    if axis == channel:
        raise ValueError(f"the examples are along dimension {axis} of a layer's output, which holds its channels")
    scale = expand_rows(scale, output, batch_axis)
    shape[axis] = scale.shape[0]
    return (scale if axis < channel else scale.T).reshape(shape)


@staged
def for_all_examples(value: Tensor, dimensions: int, where: str) -> Tensor:
    """`value`, which must not have a row per example: here the graph cannot tell along which axis the examples are.

    dimensions: of a value for the whole batch; 1 for row scales, 0 for a rate.
    where: how messages name the place.

    Raises ValueError when `value` has one dimension more.
    """
    if isinstance(value, Tensor) and value.dim() > dimensions:
        raise ValueError(
            f"{where}: the examples are not along one dimension there, so one perturbation per example is refused; pass "
            "delta and condition of shape (h,), or perturb='batch' to the losses and the runner"
        )
    return value


@staged
def mean_over_examples(scale: Tensor) -> Tensor:
    """The scales of a layer whose output all examples share: it follows their mean, as its weight does in training.

    scale: (n,), or (batch, n) with a row per example.
    """
    return scale.mean(0) if scale.dim() > 1 else scale


@staged
def pick_rows(scale: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The scales of a slice, or of a join: runs of entries one after the other.

    scale: (n,) or (batch, n).
    runs: (start, stop) of each.
    """
    parts = [scale[..., start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@staged
def without_bias(output: Tensor, bias: Tensor, dim: int) -> Tensor:
    """The product of a layer's input and its weight: its output less its bias.

    bias: (channels,).
    dim: dimension of the channels in `output`.
    """
    return output - align(bias, output, dim)


@staged
def scale_channels(output: Tensor, scale: Tensor, dim: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
    """A layer's output with each channel multiplied by its scale.

    scale: (channels,), or (batch, channels) with a row per example.
    dim: dimension of the channels in `output`.
    batch_axis: where the examples are in `output`.
    """
    return output * align(scale, output, dim, batch_axis)


@staged
def add_scaled(tangent: Tensor, output: Tensor, scale: Tensor, dim: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
    """tangent + scale ⊙ output in one kernel.

    tangent: shaped like `output`.
    output, scale, dim, batch_axis: as in `scale_channels`.
    """
    return torch.addcmul(tangent, output, align(scale, output, dim, batch_axis))


@staged
def add_bias(tangent: Tensor, scale: Tensor, response: Tensor, dim: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
    """tangent + the tangent of a bias, scale ⊙ response.

    tangent: shaped like the layer's output.
    response: (channels,).
    scale, dim, batch_axis: as in `scale_channels`.
    """
    return tangent + align(scale * response, tangent, dim, batch_axis)


@staged
def bias_tangent(
    output: Tensor, scale: Tensor, response: Tensor, dim: int, batch_axis: BatchAxis = BATCH_FIRST
) -> Tensor:
    """The tangent of a bias alone, scale ⊙ response, expanded to the shape of `output`. Arguments as in `add_bias`."""
    return align(scale * response, output, dim, batch_axis).expand_as(output)


@staged
def add_channels(tangent: Tensor, change: Tensor, dim: int) -> Tensor:
    """tangent + the tangent of a bias that is computed from other values.

    tangent: shaped like the layer's output.
    change: (channels,).
    dim: dimension of the channels.
    """
    return tangent + align(change, tangent, dim)
