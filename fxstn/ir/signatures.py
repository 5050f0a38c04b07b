"""Spellings whose arguments differ from the canonical function's, each written as a function with its own signature.

Three tables by name: METHODS, of Tensor methods alone; RAW, of ATen and of the builtins in `torch` that share ATen's
signatures; ANY, wherever the name comes from. An ATen overload may have an entry of its own, "to.dtype"; so may a name with
an underscore, which works in place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from fxstn.ir.assignment import assigned, overwritten

Tensor = torch.Tensor


@dataclass(frozen=True)
class Spelled:
    """function(*args, **kwargs) in the canonical spelling. An argument may be a Spelled itself: compute it first.

    in_place: whether the original spelling writes the result into its first argument.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False


class Unspellable(Exception):
    """A mutation without a functional counterpart; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Signature = Callable[..., Spelled]
METHODS: dict[str, Signature] = {}
RAW: dict[str, Signature] = {}
ANY: dict[str, Signature] = {}


def spell(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Spelled:
    return Spelled(function, args, kwargs)


def _called(table: dict[str, Signature], *names: str) -> Callable[[Signature], Signature]:
    def enter(signature: Signature) -> Signature:
        table.update(dict.fromkeys(names, signature))
        return signature

    return enter


# Arithmetic


def _times(factor: Any, value: Any) -> Any:
    return value if isinstance(factor, (int, float)) and factor == 1 else spell(operator.mul, value, factor)


def _sum(first: Any, second: Any, beta: Any = 1, alpha: Any = 1) -> Spelled:
    return spell(operator.add, _times(beta, first), _times(alpha, second))


@_called(ANY, "div", "divide", "true_divide")
def _div(input, other, rounding_mode=None):
    if rounding_mode is None:
        return spell(operator.truediv, input, other)
    return spell(torch.div, input, other, rounding_mode=rounding_mode)


@_called(ANY, "einsum")
def _einsum(equation, *operands, tensors=None, path=None):
    operands = operands if tensors is None else (tensors,)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    return spell(torch.einsum, equation, *operands)


@_called(ANY, "norm")
def _norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    kwargs = {} if dtype is None else {"dtype": dtype}
    if p == "nuc":
        return spell(torch.linalg.matrix_norm, input, p, (-2, -1) if dim is None else dim, keepdim, **kwargs)
    return spell(torch.linalg.vector_norm, input, 2.0 if p in ("fro", None) else p, dim, keepdim, **kwargs)


ANY |= {
    "mul": lambda input, other: spell(operator.mul, input, other),
    "multiply": lambda input, other: spell(operator.mul, input, other),
    "pow": lambda input, exponent: spell(operator.pow, input, exponent),
    "matmul": lambda input, other: spell(operator.matmul, input, other),
    "add": lambda input, other, alpha=1: spell(operator.add, input, _times(alpha, other)),
    **dict.fromkeys(
        ["sub", "subtract"], lambda input, other, alpha=1: spell(operator.sub, input, _times(alpha, other))
    ),
    "rsub": lambda input, other, alpha=1: spell(operator.sub, other, _times(alpha, input)),
    "addmm": lambda input, mat1, mat2, **scales: _sum(input, spell(torch.mm, mat1, mat2), **scales),
    "baddbmm": lambda input, batch1, batch2, **scales: _sum(input, spell(torch.bmm, batch1, batch2), **scales),
    "addmm.dtype": lambda *arguments, **scales: spell(torch.ops.aten.addmm.dtype, *arguments, **scales),
    "baddbmm.dtype": lambda *arguments, **scales: spell(torch.ops.aten.baddbmm.dtype, *arguments, **scales),
    "addcmul": lambda input, tensor1, tensor2, value=1: _sum(input, spell(operator.mul, tensor1, tensor2), 1, value),
    "addcdiv": lambda input, tensor1, tensor2, value=1: _sum(
        input, spell(operator.truediv, tensor1, tensor2), 1, value
    ),
    "clamp_min": lambda input, min: spell(torch.clamp, input, min, None),
    "clamp_max": lambda input, max: spell(torch.clamp, input, None, max),
}

# Assignments


@_called(ANY, "bernoulli_")
def _bernoulli(input, p=0.5, generator=None):
    """In place p is the probability; torch.bernoulli(input) takes the input's entries for it."""
    if isinstance(p, (int, float)):
        return spell(torch.bernoulli, input, p)
    return spell(torch.bernoulli, spell(Tensor.expand_as, p, input))


@_called(ANY, "fill")
def _fill(input, value):
    return spell(torch.full_like, input, value) if isinstance(value, (int, float)) else spell(overwritten, input, value)


@_called(ANY, "setitem", "__setitem__")
def _setitem(input, index, value):
    return spell(assigned, input, index, value)


ANY["copy"] = lambda input, src, non_blocking=False: spell(overwritten, input, src)
ANY["zero"] = lambda input: spell(torch.zeros_like, input)

# Layers and functions that torch has in several argument orders


def _convolution(function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return spell(function, input, weight, bias, stride, padding, dilation, groups)


@_called(ANY, "batch_norm")
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return spell(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@_called(RAW, "batch_norm")
def _raw_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return spell(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@_called(RAW, "instance_norm")
def _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True):
    return spell(F.instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@_called(ANY, "layer_norm")
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return spell(F.layer_norm, input, normalized_shape, weight, bias, eps)


@_called(ANY, "group_norm")
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return spell(F.group_norm, input, num_groups, weight, bias, eps)


@_called(RAW, "embedding")
def _embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    padding = None if padding_idx == -1 else padding_idx
    return spell(F.embedding, indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


_BAG_MAX = 2


@_called(RAW, "embedding_bag")
def _embedding_bag(
    weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
    include_last_offset=False, padding_idx=None,
):  # fmt: skip
    """Four times the embeddings: of the operation's four results they are the first, and the others are of no use."""
    if mode == _BAG_MAX:  # not linear in the table: without a rule, and so without a response
        own = (weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return spell(torch.embedding_bag, *own, include_last_offset, padding_idx)
    settings = (None, 2.0, scale_grad_by_freq, ("sum", "mean")[mode], sparse, per_sample_weights)
    bag = spell(F.embedding_bag, indices, weight, offsets, *settings, include_last_offset, padding_idx)
    return spell(Tensor.expand, spell(torch.unsqueeze, bag, 0), 4, -1, -1)


@_called(RAW, "elu")
def _elu(input, alpha=1.0, scale=1, input_scale=1):
    if scale == 1 and input_scale == 1:
        return spell(F.elu, input, alpha)
    return spell(torch.ops.aten.elu.default, input, alpha, scale, input_scale)


def _over(function, ranked, input, dim, dtype=None):
    """A softmax; without a dimension it depends on the rank, which `ranked` knows."""
    kwargs = {} if dtype is None else {"dtype": dtype}
    return spell(ranked, input, **kwargs) if dim is None else spell(function, input, dim, **kwargs)


def _over_with_level(function, ranked, input, dim=None, _stacklevel=3, dtype=None):
    return _over(function, ranked, input, dim, dtype)


for _name in ("softmax", "log_softmax"):
    for _key in (_name, f"special_{_name}"):
        ANY[_key] = functools.partial(_over_with_level, getattr(torch, _name), getattr(F, _name))
        RAW[_key] = METHODS[_key] = functools.partial(_over, getattr(torch, _name), getattr(F, _name))
for _name in ("dropout", "alpha_dropout", "feature_alpha_dropout"):
    RAW[_name] = functools.partial(
        lambda function, input, p, train: spell(function, input, p, train), getattr(F, _name)
    )
ANY["linear"] = lambda input, weight, bias=None: spell(F.linear, input, weight, bias)


def _max_pool(
    function, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):  # fmt: skip
    stride = None if stride in ([], ()) else stride
    return spell(function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _max_pool_with_indices(function, *args, **kwargs):
    return _max_pool(function, *args[:6], **{**kwargs, "return_indices": True})


def _adaptive_max_pool_with_indices(function, input, output_size, return_indices=True):
    return spell(function, input, output_size, True)


for _k in (1, 2, 3):
    _pool, _adaptive = getattr(F, f"max_pool{_k}d"), getattr(F, f"adaptive_max_pool{_k}d")
    ANY[f"conv{_k}d"] = functools.partial(_convolution, getattr(torch, f"conv{_k}d"))
    ANY[f"max_pool{_k}d"] = functools.partial(_max_pool, _pool)
    ANY[f"max_pool{_k}d_with_indices"] = functools.partial(_max_pool_with_indices, _pool)
    for _table, _key in ((RAW, f"adaptive_max_pool{_k}d"), (ANY, f"adaptive_max_pool{_k}d_with_indices")):
        _table[_key] = functools.partial(_adaptive_max_pool_with_indices, _adaptive)

# Resizing, sampling and padding

_SAMPLING = ("bilinear", "nearest", "bicubic")
_PADDING = ("zeros", "border", "reflection")


@_called(ANY, "upsample")
def _upsample(input, size=None, scale_factor=None, mode="nearest", align_corners=None):
    return spell(F.interpolate, input, size, scale_factor, mode, align_corners)


def _nearest(mode, input, output_size, scale_factors=None):
    return spell(F.interpolate, input, output_size, scale_factors, mode)


def _smooth(mode, antialias, input, output_size, align_corners, scale_factors=None):
    arguments = (input, output_size, scale_factors, mode, align_corners)
    return spell(F.interpolate, *arguments, antialias=True) if antialias else spell(F.interpolate, *arguments)


@_called(RAW, "grid_sampler")
def _grid_sampler(input, grid, interpolation_mode, padding_mode, align_corners):
    modes = _SAMPLING[interpolation_mode], _PADDING[padding_mode]
    return spell(F.grid_sample, input, grid, *modes, align_corners)


ANY["upsample_nearest"] = lambda input, size=None, scale_factor=None: _nearest("nearest", input, size, scale_factor)
ANY["upsample_bilinear"] = lambda input, size=None, scale_factor=None: _upsample(
    input, size, scale_factor, "bilinear", True
)
RAW["affine_grid_generator"] = lambda theta, size, align_corners: spell(F.affine_grid, theta, size, align_corners)
RAW["constant_pad_nd"] = lambda input, pad, value=0: spell(F.pad, input, pad, "constant", value)
for _k, _mode in ((1, "linear"), (2, "bilinear"), (3, "trilinear"), (2, "bicubic")):
    RAW[f"upsample_nearest{_k}d.vec"] = functools.partial(_nearest, "nearest")
    RAW[f"_upsample_nearest_exact{_k}d.vec"] = functools.partial(_nearest, "nearest-exact")
    RAW[f"upsample_{_mode}{_k}d.vec"] = functools.partial(_smooth, _mode, False)
    RAW[f"_upsample_{_mode}{_k}d_aa.vec"] = functools.partial(_smooth, _mode, True)
    for _name, _mode in (("reflection", "reflect"), ("replication", "replicate")):
        RAW[f"{_name}_pad{_k}d"] = functools.partial(lambda mode, input, pad: spell(F.pad, input, pad, mode), _mode)

# Views, indices and conversions


@_called(RAW, "slice")
def _slice(input, dim=0, start=None, end=None, step=1):
    last = None if isinstance(end, int) and end == torch.iinfo(torch.int64).max else end
    first = None if isinstance(start, int) and start == 0 else start
    piece = slice(first, last, None if isinstance(step, int) and step == 1 else step)
    if dim >= 0:
        return spell(operator.getitem, input, (*[slice(None)] * dim, piece))
    return spell(operator.getitem, input, (..., piece, *[slice(None)] * (-dim - 1)))


@_called(RAW, "index")
def _index(input, indices):
    return spell(operator.getitem, input, tuple(slice(None) if index is None else index for index in indices))


@_called(RAW, "to.dtype_layout", "_to_copy")
def _to_layout(input, *, dtype=None, layout=None, device=None, **_):
    return spell(Tensor.to, input, *(value for value in (device, dtype) if value is not None))


RAW |= {
    **dict.fromkeys(["alias", "lift_fresh_copy", "lift_fresh", "lift"], lambda input: spell(torch.clone, input)),
    "numpy_T": lambda input: spell(getattr, input, "T"),
    "mT": lambda input: spell(getattr, input, "mT"),
    "to.dtype": lambda input, dtype, *_, **__: spell(Tensor.to, input, dtype),
    "to.device": lambda input, device, dtype, *_, **__: spell(Tensor.to, input, device, dtype),
    "to.other": lambda input, other, *_, **__: spell(Tensor.to, input, other),
}
METHODS["where"] = lambda input, condition, other: spell(torch.where, condition, input, other)
METHODS["__len__"] = lambda input: spell(Tensor.size, input, 0)
for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": torch.remainder, "pow": operator.pow, "matmul": operator.matmul,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}.items():  # fmt: skip
    METHODS[f"__r{_name}__"] = functools.partial(lambda f, input, other: spell(f, other, input), _function)
