"""Normalisations with their statistics, and their Jacobians by fused backward kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.linear_maps import linear_map, self_adjoint
from fxstn.ops.precision import has_autocast, wide

aten = torch.ops.aten
INPUT_ONLY = [True, False, False]


@staged
def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode batch norm of x (batch, channels, ...) without running statistics: (y, mean, 1/std)."""
    if not x.numel():  # which the kernel refuses
        nothing = x.new_zeros(x.shape[1])
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), nothing, nothing
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)


@self_adjoint
def batch_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Jacobian of training-mode batch norm with respect to x, applied to `tangent`; symmetric, scaled per channel."""
    if not x.numel():
        return tangent.clone()
    return aten.native_batch_norm_backward(tangent, x, weight, None, None, mean, inverse_std, True, eps, INPUT_ONLY)[0]


@staged
def batch_norm_frozen_tangent(
    tangent: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Tangent of batch norm with given statistics: the same affine map without its shift."""
    zero = torch.zeros_like(running_mean)
    return F.batch_norm(tangent, zero, running_var, weight, None, False, 0.0, eps)


def alike(x: Tensor, *parameters: Tensor | None) -> Any:
    """x and parameters of a layer or group norm in the types that its kernels take.

    Those of the CPU take a half x with float32 parameters; those of other devices want one type. It is float32 where autocast
    is on, as autocast itself has it for these norms.
    """
    tensors = (x, *parameters)
    if x.device.type == "cpu":
        return tensors
    dtypes = [value.dtype for value in tensors if value is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    if has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = wide(dtype)
    return tuple(value if value is None else value.to(dtype) for value in tensors)


@staged
def norm_input(x: Tensor, weight: Tensor | None) -> Tensor:
    """x in the type that the kernels of a layer norm take: one conversion for the norm and its tangent."""
    return alike(x, weight)[0]


def _layer_norm_transpose(
    cotangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, shape: Sequence[int]
) -> Tensor:
    return aten.native_layer_norm_backward(cotangent, x, shape, mean, inverse_std, weight, None, INPUT_ONLY)[0]


def layer_norm_core(tangent: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, shape: Sequence[int]) -> Tensor:
    """The Jacobian of layer norm without a weight, symmetric; in the type of x.

    Without a weight the kernel of the CPU, too, takes one type, that of the statistics.
    """
    dtype = mean.dtype if x.is_cpu else x.dtype
    return _layer_norm_transpose(tangent.to(dtype), x.to(dtype), None, mean, inverse_std, shape).to(x.dtype)


@linear_map(_layer_norm_transpose)
def _layer_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, shape: Sequence[int]
) -> Tensor:
    core = layer_norm_core(tangent, x, mean, inverse_std, shape)
    return core if weight is None else core.mul_(weight)


@staged
def layer_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, shape: Sequence[int]
) -> Tensor:
    """Jacobian of layer norm over the last dimensions `shape`: the symmetric core, then the weight."""
    x, weight = alike(x, weight)
    return _layer_norm_jacobian(tangent, x, weight, mean, inverse_std, shape)


@staged
def group_norm_with_statistics(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of x (batch, channels, ...): (y, mean, 1/std), the statistics (batch, groups); one group per channel
    where groups is 0 (instance norm)."""
    x, weight, bias = alike(x.contiguous(), weight, bias)
    batch, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    return torch.native_group_norm(x, weight, bias, batch, channels, size, groups or channels, eps)


def _group_norm_transpose(
    cotangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> Tensor:
    batch, channels = x.shape[:2]
    size, groups = math.prod(x.shape[2:]), mean.shape[1]
    return aten.native_group_norm_backward(
        cotangent.contiguous(), x.contiguous(), mean, inverse_std, weight, batch, channels, size, groups, INPUT_ONLY
    )[0]


def _smooth_group_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> Tensor:
    """Of ordinary operations: torch's kernel has no derivative of its own."""
    shape = (*mean.shape, -1)
    values, moved = x.reshape(shape), tangent.reshape(shape)
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    eps = (inverse_std.view(variance.shape) ** -2 - variance).detach()
    inverse = torch.rsqrt(variance + eps)
    core = rms_norm_jacobian(moved - moved.mean(-1, keepdim=True), centred * inverse, inverse, 1).view_as(x)
    return core if weight is None else core * weight.view(-1, *[1] * (x.dim() - 2))


@linear_map(_group_norm_transpose, _smooth_group_norm_jacobian)
def _group_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> Tensor:
    core = _group_norm_transpose(tangent, x, None, mean, inverse_std)
    return core if weight is None else core.mul_(weight.view(-1, *[1] * (x.dim() - 2)))


@staged
def group_norm_jacobian(tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """Jacobian of group norm with the statistics that `group_norm_with_statistics` returns: symmetric, then the weight."""
    x, weight = alike(x, weight)
    return _group_norm_jacobian(tangent, x, weight, mean, inverse_std)


@staged
def inverse_rms(x: Tensor, shape: Sequence[int], eps: float | None) -> Tensor:
    """1/√(mean x² + eps) over the last dimensions `shape`, kept; eps None: the machine epsilon of x."""
    dims = tuple(range(-len(shape), 0))
    return torch.rsqrt((x * x).mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))


@self_adjoint
def rms_norm_jacobian(tangent: Tensor, normalized: Tensor, inverse: Tensor, dims: int) -> Tensor:
    """Jacobian of x ↦ x/rms(x), without weight: symmetric.

    normalized: x/rms(x) over its last `dims` dimensions.
    """
    over = tuple(range(-dims, 0))
    return inverse * torch.addcmul(tangent, normalized, (normalized * tangent).mean(over, keepdim=True), value=-1)


@staged
def local_response_tangent(tangent: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Tangent of local response norm, x s^-β with s = k + α · mean of x² over `size` neighbouring channels."""

    def neighbours(values: Tensor) -> Tensor:
        flat = F.pad(values.flatten(2).unsqueeze(1), (0, 0, size // 2, (size - 1) // 2))
        return F.avg_pool2d(flat, (size, 1), stride=1).squeeze(1).view_as(values)

    s = k + alpha * neighbours(x * x)
    return s**-beta * (tangent - x * (beta / s) * (2 * alpha * neighbours(x * tangent)))
