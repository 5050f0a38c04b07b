"""The map from the unconstrained λ that is optimised to the ranges that hyperparameters live in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxstn.hp.hyperparameter import Hyperparameter


class Bijection(torch.nn.Module):
    """All hyperparameters at once: unconstrained (..., h) → constrained (..., h).

    The map is a stretched sigmoid, its version in log space, or exp for a range without upper end; integers are floored.
    """

    low: Tensor
    width: Tensor
    exponential: Tensor
    unbounded: Tensor
    integer: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, hyperparameters: Sequence[Hyperparameter]) -> None:
        super().__init__()
        log, integer = [p.log for p in hyperparameters], [p.integer for p in hyperparameters]
        unbounded = [math.isinf(p.high) for p in hyperparameters]
        ends = [(0.0, 1.0) if math.isinf(p.high) else p.interval for p in hyperparameters]
        ends = [
            (math.log(a), math.log(b)) if p.log else (a, b) for p, (a, b) in zip(hyperparameters, ends, strict=True)
        ]
        buffers: dict[str, list[float] | list[bool]] = {
            "low": [float(a) for a, _ in ends],
            "width": [float(b - a) for a, b in ends],
            "exponential": log,
            "unbounded": unbounded,
            "integer": integer,
        }
        if any(integer):
            buffers["least"] = [float(p.low) for p in hyperparameters]
            buffers["most"] = [float(p.high) for p in hyperparameters]
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.any_exponential, self.any_unbounded, self.any_integer = any(log), any(unbounded), any(integer)

    def position(self, unconstrained: Tensor) -> Tensor:
        """The share of its range, in [0, 1], below each unconstrained number; 0.5 where the range has no upper end."""
        share = torch.sigmoid(unconstrained)
        return torch.where(self.unbounded, 0.5, share) if self.any_unbounded else share

    def forward(self, unconstrained: Tensor) -> Tensor:
        value = torch.addcmul(self.low, self.width, torch.sigmoid(unconstrained))
        if self.any_exponential:
            value = torch.where(self.exponential, value.exp(), value)
        if self.any_unbounded:
            value = torch.where(self.unbounded, unconstrained.exp(), value)
        if self.any_integer:  # a saturated sigmoid gives high + 1, and exp(log(low)) may round to less than low
            value = torch.where(self.integer, value.floor().clamp(self.least, self.most), value)
        return value
