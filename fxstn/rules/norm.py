"""Normalisations: dy = J dx · weight + x̂ · dweight + dbias, J by the fused backward where torch has one."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fxstn.ir.tangents import ZERO, Scaled
from fxstn.ops.kernels import along_channels, expand_like, expand_to_both
from fxstn.ops.norms import (
    batch_norm_frozen_tangent,
    batch_norm_jacobian,
    batch_norm_with_statistics,
    group_norm_jacobian,
    group_norm_with_statistics,
    inverse_rms,
    layer_norm_jacobian,
    local_response_tangent,
    norm_input,
    rms_norm_jacobian,
)
from fxstn.ops.response import without_bias
from fxstn.ops.synced import synced_batch_norm, synced_batch_norm_jacobian, synced_batch_norm_with_statistics
from fxstn.rules.layers import scaled_layer, with_scaled, with_shifted
from fxstn.rules.reduce import vector_norm_tangent
from fxstn.rules.registry import ParameterRole, rule, total

GAIN, SHIFT = ParameterRole("gain", (0,)), ParameterRole("shift", (0,))


def _affine(d, y, jacobian, plain, weight, bias, channel=1):
    """J dx + x̂ · dweight + dbias along the channels.

    plain: computes x̂, the norm of the input without weight and bias.
    channel: dimension of y along which weight and bias are scaled. −k where these have k dimensions, the last ones of y.
    """
    per_channel = (lambda v: along_channels(v, y)) if channel == 1 else (lambda v: v)
    dy = total((d.input, jacobian))
    if channel < -1 and (isinstance(d.weight, Scaled) or isinstance(d.bias, Scaled)):
        return _affine_of_several_dimensions(dy, y, d, plain, channel)
    if (scaled := scaled_layer(dy, y, d, weight, bias, channel)) is not None:
        return scaled
    if isinstance(d.weight, Scaled):
        if d.weight.response is not weight:
            product = plain() * per_channel(d.weight.response)
        else:  # weight · x̂ is at hand
            product = y if bias is None else without_bias(y, bias, channel)
        dy = with_scaled(dy, product, d.weight, channel)
    elif d.weight is not ZERO:
        dy = total((dy, lambda dy: dy), (d.weight, lambda dw: plain() * per_channel(dw)))
    if isinstance(d.bias, Scaled):
        return with_shifted(dy, y, d.bias, channel)
    return total((dy, lambda dy: dy), (d.bias, lambda db: expand_like(per_channel(db), y)))


def _affine_of_several_dimensions(dy, y, d, plain, channel):
    """`_affine` of weight and bias whose first dimension alone is scaled."""
    if isinstance(d.weight, Scaled):
        dy = with_scaled(dy, plain() * d.weight.response, d.weight, channel)
    else:
        dy = total((dy, lambda dy: dy), (d.weight, lambda dw: plain() * dw))
    if isinstance(d.bias, Scaled):
        return with_scaled(dy, expand_like(d.bias.response, y), d.bias, channel)
    return total((dy, lambda dy: dy), (d.bias, lambda db: expand_like(db, y)))


def _batch_norm(d, input, running_mean, running_var, weight, bias, training, momentum, eps, kernels):
    function, with_statistics, jacobian_of = kernels
    if not training:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        jacobian = lambda dx: batch_norm_frozen_tangent(dx, running_mean, running_var, weight, eps)  # noqa: E731
        plain = lambda: F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)  # noqa: E731
        return y, _affine(d, y, jacobian, plain, weight, bias)
    results = with_statistics(input, weight, bias, eps)
    y, mean, inverse_std = (operator.getitem(results, i) for i in range(3))
    jacobian = lambda dx: jacobian_of(dx, input, weight, mean, inverse_std, eps)  # noqa: E731
    plain = lambda: function(input, None, None, training=True, eps=eps)  # noqa: E731
    return y, _affine(d, y, jacobian, plain, weight, bias)


OF_BATCH = F.batch_norm, batch_norm_with_statistics, batch_norm_jacobian
OF_PROCESSES = synced_batch_norm, synced_batch_norm_with_statistics, synced_batch_norm_jacobian


@rule(F.batch_norm, reads={3: GAIN, 4: SHIFT}, fresh=True)
def batch_norm(
    d, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    return _batch_norm(d, input, running_mean, running_var, weight, bias, training, momentum, eps, OF_BATCH)


@rule(synced_batch_norm, reads={3: GAIN, 4: SHIFT}, fresh=True)
def batch_norm_of_processes(
    d, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    return _batch_norm(d, input, running_mean, running_var, weight, bias, training, momentum, eps, OF_PROCESSES)


def _group_norm(d, input, groups, weight, bias, eps):
    results = group_norm_with_statistics(input, groups, weight, bias, eps)
    y, mean, inverse_std = (operator.getitem(results, i) for i in range(3))
    jacobian = lambda dx: group_norm_jacobian(dx, input, weight, mean, inverse_std)  # noqa: E731
    plain = lambda: operator.getitem(group_norm_with_statistics(input, groups, None, None, eps), 0)  # noqa: E731
    return y, _affine(d, y, jacobian, plain, weight, bias)


@rule(F.group_norm, reads={2: GAIN, 3: SHIFT}, fresh=True)
def group_norm(d, input, num_groups, weight=None, bias=None, eps=1e-5):
    return _group_norm(d, input, num_groups, weight, bias, eps)


@rule(F.instance_norm, reads={3: GAIN, 4: SHIFT}, fresh=True)
def instance_norm(
    d,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if use_input_stats:
        return _group_norm(d, input, 0, weight, bias, eps)
    return batch_norm(d, input, running_mean, running_var, weight, bias, False, momentum, eps)


@rule(F.layer_norm, reads={2: GAIN, 3: SHIFT}, fresh=True)
def layer_norm(d, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    input = norm_input(input, weight)
    results = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    y, mean, inverse_std = (operator.getitem(results, i) for i in range(3))
    jacobian = lambda dx: layer_norm_jacobian(dx, input, weight, mean, inverse_std, normalized_shape)  # noqa: E731
    plain = lambda: F.layer_norm(input, normalized_shape, eps=eps)  # noqa: E731
    return y, _affine(d, y, jacobian, plain, weight, bias, channel=-len(normalized_shape))


@rule(F.rms_norm, reads={2: GAIN}, fresh=True)
def rms_norm(d, input, normalized_shape, weight=None, eps=None):
    inverse = inverse_rms(input, normalized_shape, eps)
    normalized = input * inverse
    y = normalized if weight is None else normalized * weight
    scaled = lambda dx: dx if weight is None else dx * weight  # noqa: E731
    jacobian = lambda dx: scaled(rms_norm_jacobian(dx, normalized, inverse, len(normalized_shape)))  # noqa: E731
    d.bias = ZERO
    return y, _affine(d, y, jacobian, lambda: normalized, weight, None, channel=-len(normalized_shape))


@rule(F.local_response_norm, fresh=True)
def local_response_norm(d, input, size, alpha=1e-4, beta=0.75, k=1.0):
    y = F.local_response_norm(input, size, alpha, beta, k)
    return y, local_response_tangent(d.input, input, size, alpha, beta, k)


@rule(F.normalize, fresh=True)
def normalize(d, input, p=2.0, dim=1, eps=1e-12):
    """y = x/n with n = max(‖x‖, eps): dy = (dx − y dn)/n."""
    norm = torch.linalg.vector_norm(input, p, dim, keepdim=True)
    divisor = torch.clamp(norm, min=eps)
    y = input / divisor
    change = vector_norm_tangent(d.input, input, p, dim, True) * (norm >= eps)
    return y, (d.input - y * change) / divisor


@rule(F.cosine_similarity, fresh=True)
def cosine_similarity(d, x1, x2, dim=1, eps=1e-8):
    wide1, wide2 = expand_to_both(x1, x2), expand_to_both(x2, x1)
    du1, du2 = (total((dx, lambda dx: expand_like(dx, wide1))) for dx in (d.x1, d.x2))
    (u1, du1), (u2, du2) = _unit(du1, wide1, dim, eps), _unit(du2, wide2, dim, eps)
    product = lambda a, b: (a * b).sum(dim)  # noqa: E731
    return product(u1, u2), total((du1, lambda du: product(du, u2)), (du2, lambda du: product(u1, du)))


def _unit(dx, x, dim, eps):
    """(u, du) of u = x/max(‖x‖, eps)."""
    if dx is ZERO:
        return F.normalize(x, 2.0, dim, eps), ZERO
    return normalize(SimpleNamespace(input=dx), x, 2.0, dim, eps)
