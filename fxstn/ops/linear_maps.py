"""Jacobians by fused kernels. A self-adjoint one's backward kernel is its own tangent and its own transpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxstn.ir.staging import staged
from fxstn.ops.complex_numbers import conjugate

Context = Any  # of an autograd function: torch's own type lacks what a function keeps in it


class _LinearMap(torch.autograd.Function):
    """J dx by one kernel, its backward Jᵀ g by another, so that neither needs a derivative of its own."""

    @staticmethod
    def forward(
        ctx: Context, tangent: Tensor, kernel: Callable[..., Tensor], transpose: Callable[..., Tensor], *saved: object
    ) -> Tensor:
        _save(ctx, kernel, transpose, saved)
        return kernel(tangent, *saved)

    @staticmethod
    def backward(ctx: Context, *grads: Any) -> Any:
        tensors, plain = iter(ctx.saved_tensors), iter(ctx.plain)
        saved = [next(tensors) if is_tensor else next(plain) for is_tensor in ctx.is_tensor]
        if ctx.symmetric and grads[0].is_complex():
            saved = [conjugate(value) for value in saved]
        return ctx.transpose(grads[0], *saved), None, None, *[None] * len(saved)


def _save(
    ctx: Context, kernel: Callable[..., Tensor], transpose: Callable[..., Tensor], saved: Sequence[object]
) -> None:
    ctx.transpose, ctx.is_tensor = transpose, [isinstance(value, Tensor) for value in saved]
    ctx.symmetric = transpose is kernel
    ctx.plain = [value for value in saved if not isinstance(value, Tensor)]
    ctx.save_for_backward(*[value for value in saved if isinstance(value, Tensor)])


class _TransformedLinearMap(torch.autograd.Function):
    """The same for torch's function transforms. Elsewhere it takes longer: torch looks at the names of its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        tangent: Tensor, kernel: Callable[..., Tensor], transpose: Callable[..., Tensor], *saved: object
    ) -> Tensor:
        return kernel(tangent, *saved)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs[1], inputs[2], inputs[3:])

    backward = _LinearMap.backward


def differentiates(*values: object) -> bool:
    """Whether autograd records derivatives in one of several values, or structures of them.

    Of primal values it does where an objective differentiates the network by its inputs (hp.JacobianNorm); the weights are
    constants while a tangent is computed.
    """
    if not torch.is_grad_enabled():
        return False
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (tuple, list, dict)) and differentiates(*tree_leaves(value)):
            return True
    return False


def by_single_operations(*constants: object) -> bool:
    """Whether torch must see single operations: in its function transforms, its compiler, and for derivatives in constants."""
    functional = torch._C._are_functorch_transforms_active()
    return functional or torch.compiler.is_compiling() or differentiates(*constants)


def linear_map(
    transpose: Callable[..., Tensor], smooth: Callable[..., Tensor] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: stage kernel(tangent, *saved), linear in `tangent`, with transpose(cotangent, *saved) as its gradient.

    saved: primal values, the first of which has the tangent's type (autocast may have left another). They are constants,
        unless autograd records derivatives in them.
    smooth: what is computed then, as kernel, of operations that can be differentiated again. None for the kernel itself.
    """

    def decorate(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(kernel)
        def apply(tangent: Tensor, *saved: Any) -> Tensor:
            tangent = tangent.to(saved[0].dtype)
            if differentiates(*saved):
                return (smooth or kernel)(tangent, *saved)
            linear = _TransformedLinearMap if torch._C._are_functorch_transforms_active() else _LinearMap
            return linear.apply(tangent, kernel, transpose, *saved)

        apply.__name__ = getattr(kernel, "__name__", str(kernel)).replace("_backward", "_jacobian")
        apply.__module__ = __name__
        return staged(apply)

    return decorate


def self_adjoint(kernel: Callable[..., Tensor], smooth: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """As `linear_map`, for a symmetric kernel: it is its own transpose, that of complex numbers with conjugate saved values.

    A backward kernel of torch that conjugates its saved values (sigmoid, tanh) is given their conjugates.
    """
    return linear_map(kernel, smooth)(kernel)
