"""Spellings of layers and other functions of torch.nn.functional, whose arguments torch has in several orders.

The tables are those of `fxstn.ir.signatures`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import takewhile

import torch
import torch.nn.functional as F

from fxstn.ir.signatures import ANY, METHODS, RAW, Spelled, Value, called, spell

Tensor = torch.Tensor
Operation = Callable[..., object]


def _convolution(
    function: Operation,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Value = 1,
    padding: Value = 0,
    dilation: Value = 1,
    groups: Value = 1,
) -> Spelled:
    return spell(function, input, weight, bias, stride, padding, dilation, groups)


@called(ANY, "batch_norm")
def _batch_norm(
    input: Value,
    running_mean: Value,
    running_var: Value,
    weight: Value = None,
    bias: Value = None,
    training: Value = False,
    momentum: Value = 0.1,
    eps: Value = 1e-5,
) -> Spelled:
    return spell(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@called(RAW, "batch_norm")
def _raw_batch_norm(
    input: Value,
    weight: Value,
    bias: Value,
    running_mean: Value,
    running_var: Value,
    training: Value,
    momentum: Value,
    eps: Value,
    cudnn_enabled: Value = True,
) -> Spelled:
    return spell(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@called(RAW, "instance_norm")
def _instance_norm(
    input: Value,
    weight: Value,
    bias: Value,
    running_mean: Value,
    running_var: Value,
    use_input_stats: Value,
    momentum: Value,
    eps: Value,
    cudnn_enabled: Value = True,
) -> Spelled:
    return spell(F.instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@called(ANY, "layer_norm")
def _layer_norm(
    input: Value,
    normalized_shape: Value,
    weight: Value = None,
    bias: Value = None,
    eps: Value = 1e-5,
    cudnn_enable: Value = True,
) -> Spelled:
    return spell(F.layer_norm, input, normalized_shape, weight, bias, eps)


@called(ANY, "group_norm")
def _group_norm(
    input: Value,
    num_groups: Value,
    weight: Value = None,
    bias: Value = None,
    eps: Value = 1e-5,
    cudnn_enabled: Value = True,
) -> Spelled:
    return spell(F.group_norm, input, num_groups, weight, bias, eps)


@called(RAW, "embedding")
def _embedding(
    weight: Value, indices: Value, padding_idx: Value = -1, scale_grad_by_freq: Value = False, sparse: Value = False
) -> Spelled:
    padding = None if padding_idx == -1 else padding_idx
    return spell(F.embedding, indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


_BAG_MAX = 2


@called(RAW, "embedding_bag")
def _embedding_bag(
    weight: Value,
    indices: Value,
    offsets: Value,
    scale_grad_by_freq: Value = False,
    mode: int = 0,
    sparse: Value = False,
    per_sample_weights: Value = None,
    include_last_offset: Value = False,
    padding_idx: Value = None,
) -> Spelled:
    """Four times the embeddings: of the operation's four results they are the first, and the others are of no use."""
    if mode == _BAG_MAX:  # not linear in the table: without a rule, and so without a response
        own = (weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return spell(torch.embedding_bag, *own, include_last_offset, padding_idx)
    settings = (None, 2.0, scale_grad_by_freq, ("sum", "mean")[mode], sparse, per_sample_weights)
    bag = spell(F.embedding_bag, indices, weight, offsets, *settings, include_last_offset, padding_idx)
    return spell(Tensor.expand, spell(torch.unsqueeze, bag, 0), 4, -1, -1)


@called(RAW, "elu")
def _elu(input: Value, alpha: Value = 1.0, scale: Value = 1, input_scale: Value = 1) -> Spelled:
    if scale == 1 and input_scale == 1:
        return spell(F.elu, input, alpha)
    return spell(torch.ops.aten.elu.default, input, alpha, scale, input_scale)


def _over(function: Operation, ranked: Operation, input: Value, dim: Value, dtype: Value = None) -> Spelled:
    """A softmax; without a dimension it depends on the rank, which `ranked` knows."""
    kwargs = {} if dtype is None else {"dtype": dtype}
    return spell(ranked, input, **kwargs) if dim is None else spell(function, input, dim, **kwargs)


def _over_with_level(
    function: Operation, ranked: Operation, input: Value, dim: Value = None, _stacklevel: Value = 3, dtype: Value = None
) -> Spelled:
    return _over(function, ranked, input, dim, dtype)


for _name in ("softmax", "log_softmax"):
    for _key in (_name, f"special_{_name}"):
        ANY[_key] = functools.partial(_over_with_level, getattr(torch, _name), getattr(F, _name))
        RAW[_key] = METHODS[_key] = functools.partial(_over, getattr(torch, _name), getattr(F, _name))
for _name in ("dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"):
    RAW[_name] = functools.partial(
        lambda function, input, p, train: spell(function, input, p, train), getattr(F, _name, torch.feature_dropout)
    )
ANY["linear"] = lambda input, weight, bias=None: spell(F.linear, input, weight, bias)


def _max_pool(
    function: Operation,
    input: Value,
    kernel_size: Value,
    stride: Value = None,
    padding: Value = 0,
    dilation: Value = 1,
    ceil_mode: Value = False,
    return_indices: Value = False,
) -> Spelled:
    stride = None if stride in ([], ()) else stride
    return spell(function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _max_pool_with_indices(function: Operation, *args: Value, **kwargs: Value) -> Spelled:
    return _max_pool(function, *args[:6], **{**kwargs, "return_indices": True})


def _adaptive_max_pool_with_indices(
    function: Operation, input: Value, output_size: Value, return_indices: Value = True
) -> Spelled:
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


@called(ANY, "upsample")
def _upsample(
    input: Value, size: Value = None, scale_factor: Value = None, mode: Value = "nearest", align_corners: Value = None
) -> Spelled:
    return spell(F.interpolate, input, size, scale_factor, mode, align_corners)


def _nearest(mode: str, input: Value, output_size: Value, scale_factors: Value = None) -> Spelled:
    return spell(F.interpolate, input, output_size, scale_factors, mode)


def _smooth(
    mode: str, antialias: bool, input: Value, output_size: Value, align_corners: Value, scale_factors: Value = None
) -> Spelled:
    arguments = (input, output_size, scale_factors, mode, align_corners)
    return spell(F.interpolate, *arguments, antialias=True) if antialias else spell(F.interpolate, *arguments)


@called(RAW, "grid_sampler")
def _grid_sampler(
    input: Value, grid: Value, interpolation_mode: int, padding_mode: int, align_corners: Value
) -> Spelled:
    modes = _SAMPLING[interpolation_mode], _PADDING[padding_mode]
    return spell(F.grid_sample, input, grid, *modes, align_corners)


ANY["upsample_nearest"] = lambda input, size=None, scale_factor=None: _nearest("nearest", input, size, scale_factor)
ANY["upsample_bilinear"] = lambda input, size=None, scale_factor=None: _upsample(
    input, size, scale_factor, "bilinear", True
)
RAW["affine_grid_generator"] = lambda theta, size, align_corners: spell(F.affine_grid, theta, size, align_corners)
RAW["constant_pad_nd"] = lambda input, pad, value=0: (
    spell(torch.constant_pad_nd, input, pad, value)  # F.pad takes no complex value
    if isinstance(value, complex)
    else spell(F.pad, input, pad, "constant", value)
)
for _k, _mode in ((1, "linear"), (2, "bilinear"), (3, "trilinear"), (2, "bicubic")):
    RAW[f"upsample_nearest{_k}d.vec"] = functools.partial(_nearest, "nearest")
    RAW[f"_upsample_nearest_exact{_k}d.vec"] = functools.partial(_nearest, "nearest-exact")
    RAW[f"upsample_{_mode}{_k}d.vec"] = functools.partial(_smooth, _mode, False)
    RAW[f"_upsample_{_mode}{_k}d_aa.vec"] = functools.partial(_smooth, _mode, True)
    for _name, _mode in (("reflection", "reflect"), ("replication", "replicate")):
        RAW[f"{_name}_pad{_k}d"] = functools.partial(lambda mode, input, pad: spell(F.pad, input, pad, mode), _mode)

_DISTANCES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


@called(RAW, "cdist")
def _cdist(x1: Value, x2: Value, p: Value = 2.0, compute_mode: int | None = None) -> Spelled:
    return spell(torch.cdist, x1, x2, p, _DISTANCES[compute_mode or 0])


# Losses: ATen has a number for the reduction, and torch.nn.functional its name.

_REDUCTIONS = ("none", "mean", "sum")
_LOSSES: tuple[Operation, ...] = (
    *(F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.soft_margin_loss),
    *(F.hinge_embedding_loss, F.margin_ranking_loss, F.multi_margin_loss, F.multilabel_margin_loss),
    *(F.cosine_embedding_loss, F.triplet_margin_loss),
)


def _enter_loss(function: Operation, name: str) -> None:
    """The signature of ATen's loss of this name, whose tensors come first."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    tensors = sum(str(argument.type) == "Tensor" for argument in arguments)
    parameters = list(inspect.signature(function).parameters)[tensors:]

    def signature(*args: Value, **kwargs: Value) -> Spelled:
        settings = dict(zip(names[tensors:], args[tensors:], strict=False)) | kwargs
        if isinstance(reduction := settings.get("reduction"), int):
            settings["reduction"] = _REDUCTIONS[reduction]
        following = takewhile(settings.__contains__, parameters)
        return spell(function, *args[:tensors], *[settings.pop(name) for name in following], **settings)

    RAW[name] = signature


for _loss in _LOSSES:
    _enter_loss(_loss, _loss.__name__)
_enter_loss(F.cross_entropy, "cross_entropy_loss")
_enter_loss(F.nll_loss, "nll_loss_nd")
_enter_loss(F.nll_loss, "nll_loss2d")
RAW["broadcast_tensors"] = lambda tensors: spell(torch.broadcast_tensors, *tensors)
