"""What half precision would round away is float32 at least: λ, σ, Θ, strengths, sums and averages.

A step of 1e-3 is lost in a bfloat16 number near 1, whose neighbours are 2⁻⁷ apart. An optimizer keeps its state in the type of
its parameter, so the parameters themselves are wide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.ir.containers import tensors_in
from fxstn.ir.staging import staged


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for a floating-point type with fewer bits; any other type as it is."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def inexact(x: Tensor) -> bool:
    """Whether a tensor has floating-point or complex numbers: a model may hold an index or a mask as a parameter, too."""
    return x.is_floating_point() or x.is_complex()


def real(dtype: torch.dtype) -> torch.dtype:
    """The type of the parts of a complex type, else the type itself."""
    return dtype.to_real() if dtype.is_complex else dtype  # torch.compile does not know to_real


def as_real(values: Sequence[Tensor]) -> list[Tensor]:
    """Complex values as their real and imaginary parts, along a last dimension of two; others as they are."""
    return [torch.view_as_real(value) if value.is_complex() else value for value in values]


def widen(x: Tensor) -> Tensor:
    """A value in `wide` of its type."""
    return x.to(wide(x.dtype))


class WideModule(nn.Module):
    """A module whose parameters and buffers `.half()`, `.bfloat16()` and `.to(dtype)` leave in float32.

    They move to another device, and to float64, as those of every module.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideModule:
        def convert(x: Tensor) -> Tensor:
            result = fn(x)
            return result if result.dtype == wide(result.dtype) else x.to(result.device, wide(result.dtype))

        super()._apply(convert, recurse)
        return self


@torch.compiler.assume_constant_result  # torch.compile of torch 2.9 cannot ask
def has_autocast(device_type: str) -> bool:
    """Whether torch has an autocast for a type of device."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which products have the type of their factors."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def in_full_precision(function: Callable[..., Any], device_type: str | None) -> Callable[..., Any]:
    """The function, which runs without the autocast of one type of device; None: of that which its operands are on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = device_type or next((x.device.type for x in tensors_in((args, kwargs))), "cpu")
        if not has_autocast(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    run.__module__ = __name__  # a graph writes it before the name, and some functions of torch have none
    return run


def low(x: Tensor) -> torch.dtype:
    """The type that autocast lowers a float32 operand of a product to; that of the operand where it does not."""
    device = x.device.type
    if x.dtype != torch.float32 or not has_autocast(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


@staged
def lower(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Weights in the type that autocast lowers products to, without gradients; as they are where it is off."""
    device = weights[0].device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return weights
    dtype = torch.get_autocast_dtype(device)
    wide_ones = [weight.detach() for weight in weights if weight.dtype == torch.float32]
    lowered = [torch.empty_like(weight, dtype=dtype) for weight in wide_ones]
    if lowered:
        torch._foreach_copy_(lowered, wide_ones)  # one kernel for many
    rest = iter(lowered)
    return [next(rest) if weight.dtype == torch.float32 else weight for weight in weights]
