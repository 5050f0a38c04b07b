"""Fused kernels used as tangents. A self-adjoint Jacobian's backward kernel is its own tangent and its own transpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxstn.staging import staged


class _SelfAdjoint(torch.autograd.Function):
    """J dx by a backward kernel; its own backward is J again, so it needs no derivative of that kernel."""

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, kernel: Callable[..., Tensor], *saved: Any) -> Tensor:
        ctx.kernel = kernel
        ctx.is_tensor = [isinstance(value, Tensor) for value in saved]
        ctx.plain = [value for value in saved if not isinstance(value, Tensor)]
        ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
        return kernel(tangent, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors, plain = iter(ctx.saved_tensors), iter(ctx.plain)
        saved = [next(tensors) if is_tensor else next(plain) for is_tensor in ctx.is_tensor]
        return ctx.kernel(grads[0], *saved), None, *[None] * len(saved)


def self_adjoint(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Stage kernel(tangent, *saved), a symmetric linear map of `tangent`, so that it is differentiable in `tangent`.

    The primal values in `saved` are taken as constants: a response never needs a gradient through the primal stream.
    """

    @functools.wraps(kernel)
    def apply(tangent: Tensor, *saved: Any) -> Tensor:
        return _SelfAdjoint.apply(tangent, kernel, *saved)

    apply.__name__ = getattr(kernel, "__name__", str(kernel)).replace("_backward", "_jacobian")
    apply.__module__ = __name__
    return staged(apply)


@staged
def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode batch norm of x (batch, channels, ...) without running statistics: (y, mean, 1/std)."""
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)


@self_adjoint
def batch_norm_jacobian(
    tangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Jacobian of training-mode batch norm with respect to x, applied to `tangent`; symmetric, scaled per channel."""
    return torch.ops.aten.native_batch_norm_backward(
        tangent, x, weight, None, None, mean, inverse_std, True, eps, [True, False, False]
    )[0]


@staged
def batch_norm_frozen_tangent(
    tangent: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Tangent of batch norm with given statistics: the same affine map without its shift."""
    zero = torch.zeros_like(running_mean)
    return torch.nn.functional.batch_norm(tangent, zero, running_var, weight, None, False, 0.0, eps)


@staged
def pick(tangent: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """Entries of `tangent` that max pooling chose: indices into its last `spatial` dimensions, flattened."""
    return tangent.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view_as(indices)


@staged
def sum_except(value: Tensor, dim: int) -> Tensor:
    """Sum over every axis but `dim`, kept as axes of size 1; over all of them for dim = −1, as torch's weight norm counts."""
    axes = [axis for axis in range(value.dim()) if axis != dim]
    return value.sum(axes, keepdim=True)


@staged
def expand_like(tangent: Tensor, output: Tensor) -> Tensor:
    """Broadcast a tangent to the shape of the result it belongs to."""
    return tangent if tangent.shape == output.shape else tangent.expand_as(output)


@staged
def zeros_tangent(output: Any) -> Any:
    """Real zeros for a floating-point output that depends on no weight; None for anything else."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return torch.zeros_like(output)
    return None


@functools.cache
def node_jvp(function: Callable[..., Any]) -> Callable[..., Any]:
    """A staged (args, kwargs, tangents) → (y, dy) by torch.func.jvp of this one operation, where no rule exists.

    tangents: one entry per entry of args, None where the argument is constant.
    """

    def jvp(args: tuple, kwargs: dict, tangents: tuple) -> tuple[Any, Any]:
        varying = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def of_varying(*values: Tensor) -> Any:
            full = list(args)
            for i, value in zip(varying, values, strict=True):
                full[i] = value
            return function(*full, **kwargs)

        primals = tuple(args[i] for i in varying)
        y, dy = torch.func.jvp(of_varying, primals, tuple(tangents[i] for i in varying))  # type: ignore[misc]
        return y, dy

    jvp.__name__ = f"jvp_{getattr(function, '__name__', 'node')}"
    return staged(jvp)
