"""Batch norm over all processes of a run (nn.SyncBatchNorm), of ordinary operations and a sum that has a derivative.

torch's own needs CUDA and has no tangent. In a single process these are the kernels of plain batch norm. Several processes:
each must get here, in the same order, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.norms import batch_norm_jacobian, batch_norm_with_statistics
from fxstn.ops.precision import widen


class _Total(torch.autograd.Function):
    """Sum over processes. Each one's loss reads it, and the gradient is that of the sum of the losses: a sum, too."""

    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        result = share.detach().clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Total.apply(gradients[0].contiguous())


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """A value (channels,) so that it broadcasts with x (batch, channels, ...)."""
    return value.view(-1, *[1] * (x.dim() - 2))


def _sums(x: Tensor) -> Tensor:
    """(channels,) of this process."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1])


def _share(x: Tensor) -> Tensor:
    """How many values of a channel this process has, (1,)."""
    return x.new_full((1,), x.numel() // x.shape[1])


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̂, mean, variance, and values per channel in all processes."""
    x = widen(x)
    *sums, count = _Total.apply(torch.cat([_sums(x), _share(x)])).split([x.shape[1], 1])
    mean = sums[0] / count
    centred = x - _per_channel(mean, x)
    variance = _Total.apply(_sums(centred * centred)) / count
    return centred * _per_channel(torch.rsqrt(variance + eps), x), mean, variance, count


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    y = normalized if weight is None else normalized * _per_channel(weight, normalized)
    return (y if bias is None else y + _per_channel(bias, y)).to(like.dtype)


@staged(compiled=False)
def synced_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """F.batch_norm, in training by the mean and variance over the batches of all processes; sizes may differ."""
    if not training or _alone():
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    normalized, mean, variance, count = _normalized(input, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return _affine(normalized, weight, bias, input)


@staged(compiled=False)
def synced_batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_norm_with_statistics`, over all processes."""
    if _alone():
        return batch_norm_with_statistics(x, weight, bias, eps)
    normalized, mean, variance, _ = _normalized(x, eps)
    return _affine(normalized, weight, bias, x), mean, torch.rsqrt(variance + eps)


@staged(compiled=False)
def synced_batch_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """As `batch_norm_jacobian`: of the norm over all processes, applied to the tangents of all."""
    if _alone():
        return batch_norm_jacobian(tangent, x, weight, mean, inverse_std, eps)
    wide, moved = widen(x), widen(tangent)
    normalized = (wide - _per_channel(mean, x)) * _per_channel(inverse_std, x)
    sums = torch.cat([_sums(moved), _sums(moved * normalized), _share(wide)])
    shift, slope, count = _Total.apply(sums).split([x.shape[1], x.shape[1], 1])
    core = moved - _per_channel(shift / count, x) - normalized * _per_channel(slope / count, x)
    return _affine(core * _per_channel(inverse_std, x), weight, None, x)


BATCH_NORMS = (F.batch_norm, synced_batch_norm)
