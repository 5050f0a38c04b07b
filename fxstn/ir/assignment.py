"""Assignments by values, for a forward that writes into a tensor while tangents are carried beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxstn.ir.staging import staged


@staged
def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """x after x[index] = value; x itself stays. index: whatever a tensor takes."""
    result = x.clone()
    result[index] = value
    return result


@staged
def overwritten(x: Tensor, value: Tensor) -> Tensor:
    """What x.copy_(value) leaves in x: value, broadcast to the shape of x, in its dtype and on its device."""
    return torch.zeros_like(x).copy_(value)
