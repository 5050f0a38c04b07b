"""Response parameters of one weight or bias, and the products that use them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, Owners, Place
from fxstn.ops.batch_axis import expand_rows, row_numbers, with_mean
from fxstn.ops.parameters import parameters_in
from fxstn.ops.precision import WideModule, in_full_precision, wide, widen


class Response(WideModule):
    """Response of one parameter w: Δw = (U δ) ⊙ R, scaled along `axis` (paper, Eq. 3.14: rows, axis 0), or as a WHOLE.

    parameter: w.
    fan_in: of its layer.
    tree: holds the scales of all parameters.
    block: the number of the block of scales that is its own, or that it shares.
    structured: whether R is a parameter. It is then shaped like w, and starts from the uniform distribution of torch's linear
        and convolution layers, ±1/√fan_in. Otherwise R is None and stands for w itself, so that w(δ) = (1 + U δ) ⊙ w.

    `active` is whether w responds. It does not while it is not trained. R is in the type of w, but float32 at least.
    """

    def __init__(
        self, parameter: Tensor, fan_in: int, tree: ResponseTree, block: int, axis: int = 0, structured: bool = True
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)
        drawn = torch.empty_like(parameter, dtype=wide(parameter.dtype)) if structured else None
        self.R = None if drawn is None else nn.Parameter(drawn.uniform_(-bound, bound))
        self.block, self.axis, self.active = block, axis, True
        self._tree = (tree,)  # a tuple, because a module would become a child

    @property
    def U(self) -> Tensor:  # noqa: N802 (Eq. 3.14)
        """(n, h), a view of its rows of the scales of all parameters."""
        (tree,) = self._tree
        sizes = tree.flat_sizes
        return tree.flat_U.narrow(0, sum(sizes[: self.block]), sizes[self.block])

    def direction(self, parameter: Tensor) -> Tensor:
        """R, given w."""
        return parameter if self.R is None else self.R


class ResponseTree(WideModule):
    """The responses of a network: a tree of Response modules that mirrors the model's parameter names.

    flat_U: (N, h), the scales U of all parameters, block below block. It starts at zero, so that a fresh response predicts no
        change. It is float32 at least.
    flat_sizes: the rows of each block. Parameters that are combined row by row share one.

    Children and parameters of the root are called like those of the model: it has no other names that a model might have.
    """

    def __init__(self, flat_U: Tensor, flat_sizes: Sequence[int]) -> None:
        super().__init__()
        self.flat_U, self.flat_sizes = nn.Parameter(flat_U), tuple(flat_sizes)

    @cached_property
    def flat_responses(self) -> list[tuple[str, Response]]:
        """(parameter name, its response) of all, once the tree is whole."""
        return [(name, child) for name, child in self.named_modules() if isinstance(child, Response)]

    def forward(self, delta: Tensor) -> tuple[Tensor, ...]:
        """Scales U δ of each block, by one product: (n,) for delta (h,), (batch, n) for (batch, h)."""
        return self.flat_scales(delta).split(self.flat_sizes, -1)

    def flat_scales(self, delta: Tensor) -> Tensor:
        """U δ: (N,) for delta (h,), (batch, N) for (batch, h), in the type of U, under autocast as well."""
        return in_full_precision(nn.functional.linear, self.flat_U.device.type)(
            delta.to(self.flat_U.dtype), self.flat_U
        )


def responses_in(tree: nn.Module) -> dict[str, Response]:
    """{parameter name: its response} of a ResponseTree. Parameters that are not trained are left out."""
    assert isinstance(tree, ResponseTree)
    return {name: response for name, response in tree.flat_responses if response.active}


def row_scales(tree: nn.Module, delta: Tensor) -> dict[str, Tensor]:
    """{parameter name: U δ}, (n,) or (batch, n), of every parameter that responds.

    tree: a ResponseTree.
    delta: (h,) or (batch, h).
    """
    scales = tree(delta)
    return {name: scales[response.block] for name, response in responses_in(tree).items()}


def responding(tree: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """{name: w} of the parameters that respond and are trained, of all of a model's."""
    return {name: parameters[name] for name in responses_in(tree) if parameters[name].requires_grad}


@contextmanager
def frozen(parameters: Iterable[nn.Parameter], but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Parameters as constants: nothing computed inside records a gradient for them, save for some."""
    others = {id(parameter) for parameter in but}
    trainable = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in others]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def parameter_changes(tree: nn.Module, model: nn.Module, delta: Tensor) -> dict[str, Tensor]:
    """{parameter name: Δw} for one delta, at least float32.

    tree: a ResponseTree, over the names of the model's parameters.
    delta: (h,).
    """
    responses, parameters = responses_in(tree), parameters_in(model)
    return {
        name: materialised(scale, widen(responses[name].direction(parameters[name])), responses[name].axis)
        for name, scale in row_scales(tree, delta).items()
    }


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


def align(scale: Tensor, output: Tensor, dim: int, batch_axis: Place = BATCH_FIRST) -> Tensor:
    """Scales so that they broadcast with `output`, in its type, which autocast may have lowered.

    scale: (n,), or (batch, n) with a row per example.
    output: a tensor with n channels; any tensor where n is 1.
    dim: its dimension of channels.
    batch_axis: where the examples are in `output`.

    Raises ValueError when the examples of a scale (batch, n) are not there.
    """
    scale = scale if scale.dtype is output.dtype else scale.to(output.dtype)
    shape, single = [1] * output.dim(), scale.shape[-1] == 1
    if not single:
        shape[dim] = scale.shape[-1]
    if scale.dim() == 1:
        return scale.view(shape)
    channel = dim % max(1, output.dim())
    if isinstance(batch_axis, Owners):
        return _align_owners(scale, batch_axis, channel)
    axis = batch_axis.axis
    if axis == channel and not single:
        raise ValueError(f"the examples are along dimension {axis} of a layer's output, which holds its channels")
    scale = expand_rows(scale, output, batch_axis)
    shape[axis] = scale.shape[0]
    return (scale if axis < channel else scale.T).reshape(shape)


def _align_owners(scale: Tensor, owners: Owners, channel: int) -> Tensor:
    """`align` where each entry of a value has an example of its own."""
    numbers, columns = row_numbers(owners, len(scale)), torch.arange(scale.shape[-1], device=scale.device)
    shape = [-1 if i == channel else 1 for i in range(numbers.dim())]
    return with_mean(scale)[numbers, columns.view(shape) if len(columns) > 1 else 0]


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


def refused_places(graph: fx.Graph) -> list[str]:
    """Names of the places where a graph refuses one perturbation per example."""
    return [str(node.args[2]) for node in graph.nodes if node.target is for_all_examples]


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
def scale_channels(output: Tensor, scale: Tensor, dim: int, batch_axis: Place = BATCH_FIRST) -> Tensor:
    """A layer's output with each channel multiplied by its scale.

    scale: (channels,), or (batch, channels) with a row per example.
    dim: dimension of the channels in `output`.
    batch_axis: where the examples are in `output`.
    """
    return output * align(scale, output, dim, batch_axis)


@staged
def scale_beside(output: Tensor, scale: Tensor, dim: int, other: Tensor, batch_axis: Place = BATCH_FIRST) -> Tensor:
    """`scale_channels` of a product with `other`, or of `other` itself, whose dimension `dim` counts for a matrix.

    Beside a vector it is one less from the end.
    """
    return scale_channels(output, scale, dim + (other.dim() == 1), batch_axis)


@staged
def add_scaled(tangent: Tensor, output: Tensor, scale: Tensor, dim: int, batch_axis: Place = BATCH_FIRST) -> Tensor:
    """tangent + scale ⊙ output in one kernel.

    tangent: shaped like `output`.
    output, scale, dim, batch_axis: as in `scale_channels`.
    """
    return torch.addcmul(tangent, output, align(scale, output, dim, batch_axis))


@staged
def add_bias(tangent: Tensor, scale: Tensor, response: Tensor, dim: int, batch_axis: Place = BATCH_FIRST) -> Tensor:
    """tangent + the tangent of a bias, scale ⊙ response.

    tangent: shaped like the layer's output.
    response: (channels,).
    scale, dim, batch_axis: as in `scale_channels`.
    """
    return tangent + align(scale * response, tangent, dim, batch_axis)


@staged
def bias_tangent(output: Tensor, scale: Tensor, response: Tensor, dim: int, batch_axis: Place = BATCH_FIRST) -> Tensor:
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
