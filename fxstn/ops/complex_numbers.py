"""What formulas of real numbers need in order to hold for complex ones. For real numbers they run no further operation."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def holds_complex(*values: object) -> bool:
    """Whether one of several tensors or numbers, or structures of them, is complex."""
    return any(
        value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex) for value in tree_leaves(values)
    )


def conjugate(value: T) -> T:
    """The conjugate of a complex tensor; anything else as it is."""
    return cast(T, value.conj()) if isinstance(value, Tensor) and value.is_complex() else value


def real_product(gradient: Tensor, tangent: Tensor) -> Tensor:
    """Re(conj(gradient) · tangent), entry by entry: the change of a real number that is computed from complex ones.

    The gradient is that of torch, whose real and imaginary parts are the derivatives in these parts of the entry.
    """
    return (gradient.conj() * tangent).real if gradient.is_complex() else gradient * tangent
