"""Assignments by values, for a forward that writes into a tensor while tangents are carried beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged

Index = int | slice | Tensor | tuple["Index", ...] | list | None


@staged
def assigned(x: Tensor, index: Index, value: Tensor | float) -> Tensor:
    """x after x[index] = value. x itself stays as it is.

    x: of any shape.
    index: whatever indexes a tensor.
    value: broadcasts to x[index].
    """
    result = x.clone()
    result[index] = value
    return result


@staged
def overwritten(x: Tensor, value: Tensor) -> Tensor:
    """What x.copy_(value) leaves in x: value, broadcast to the shape of x, in its dtype and on its device."""
    return torch.zeros_like(x).copy_(value)
