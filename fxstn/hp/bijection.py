"""Maps between the unconstrained λ that is optimised and the range a hyperparameter lives in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantity:
    """One tunable number: its name, start, range [low, high], σ at the start, and the map to the real line.

    log: the range is stretched in log space, so that equal steps multiply (low > 0). high = inf (with low = 0) gives
    exp. integer: the constrained value is floored; a whole start stands for the middle of [init, init + 1). by_batch: all
    examples of a batch get the same perturbation. regularizes: a higher value is a stronger regularisation.
    Raises ValueError when the start is not strictly inside the range, when the range is empty, or when scale ≤ 0.
    """

    name: str
    init: float
    low: float
    high: float
    scale: float = 1.0
    log: bool = False
    integer: bool = False
    by_batch: bool = False
    regularizes: bool = True

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"{self.name}: low={self.low} is not below high={self.high}; give a range that is not empty"
            )
        if not self.low < self.init < self.high:
            raise ValueError(
                f"{self.name}: init={self.init} is not strictly between low={self.low} and high={self.high}; "
                "move it inside the range, or widen the range"
            )
        if not self.scale > 0 or math.isinf(self.scale):
            raise ValueError(f"{self.name}: scale={self.scale} must be positive and finite")
        if math.isinf(self.high) and self.low != 0:
            raise ValueError(f"{self.name}: a range without upper end must start at low=0, got low={self.low}")
        if self.log and not self.low > 0:
            raise ValueError(f"{self.name}: a logarithmic range needs low > 0, got low={self.low}")

    @property
    def unconstrained(self) -> float:
        """The point of the real line that maps to init."""
        if math.isinf(self.high):
            return math.log(self.init)
        low, high, init = self.low, self.high, self.init
        if self.integer and init == int(init):
            init = min(init + 0.5, (init + high) / 2)
        if self.log:
            low, high, init = math.log(low), math.log(high), math.log(init)
        share = (init - low) / (high - low)
        return math.log(share) - math.log1p(-share)


class Bijection(torch.nn.Module):
    """All maps at once: unconstrained (..., h) → constrained (..., h); stretched sigmoid, its log version, or exp."""

    low: Tensor
    width: Tensor
    exponential: Tensor
    unbounded: Tensor
    integer: Tensor

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        super().__init__()
        unbounded = [math.isinf(q.high) for q in quantities]
        ends = [(0.0, 1.0) if math.isinf(q.high) else (q.low, q.high) for q in quantities]
        ends = [(math.log(a), math.log(b)) if q.log else (a, b) for q, (a, b) in zip(quantities, ends, strict=True)]
        self.register_buffer("low", torch.tensor([a for a, _ in ends]), persistent=False)
        self.register_buffer("width", torch.tensor([b - a for a, b in ends]), persistent=False)
        self.register_buffer("exponential", torch.tensor([q.log for q in quantities]), persistent=False)
        self.register_buffer("unbounded", torch.tensor(unbounded), persistent=False)
        self.register_buffer("integer", torch.tensor([q.integer for q in quantities]), persistent=False)
        self.any_exponential, self.any_unbounded = any(q.log for q in quantities), any(unbounded)
        self.any_integer = any(q.integer for q in quantities)

    def forward(self, unconstrained: Tensor) -> Tensor:
        value = self.low + self.width * torch.sigmoid(unconstrained)
        if self.any_exponential:
            value = torch.where(self.exponential, value.exp(), value)
        if self.any_unbounded:
            value = torch.where(self.unbounded, unconstrained.exp(), value)
        return torch.where(self.integer, value.floor(), value) if self.any_integer else value
