"""Assignments: linear in the tensor that is written into and in the value together."""

from __future__ import annotations

import torch

from fxstn.ir.assignment import assigned, overwritten
from fxstn.ir.tangents import ZERO
from fxstn.rules.registry import rule


@rule(assigned, fresh=True)
def assign(d, x, index, value):
    dx = torch.zeros_like(x) if d.x is ZERO else d.x
    return assigned(x, index, value), assigned(dx, index, 0.0 if d.value is ZERO else d.value)


@rule(overwritten, fresh=True)
def overwrite(d, x, value):
    return overwritten(x, value), ZERO if d.value is ZERO else overwritten(x, d.value)
