"""Adding up: losses and time of an epoch under way, metrics over a loader."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.ops.batch_axis import batch_size


@dataclass
class RunningMeans:
    """Of an epoch: inner steps, sums of the losses and of how many each is, and seconds before the process was cut."""

    steps: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._begun = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """The losses of one step, which stay on their device."""
        for name, loss in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + loss
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1

    def means(self, device: torch.device) -> dict[str, float]:
        """Of each loss over the steps, and over processes."""
        return distributed.mean({name: float(sum_) / self.counts[name] for name, sum_ in self.totals.items()}, device)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._begun

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "totals": dict(self.totals),
            "counts": dict(self.counts),
            "seconds": self.elapsed(),
        }


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of examples whose largest logit is the target class; in [0, 1]. output: (batch, classes), target: (batch,)."""
    return (output.argmax(-1) == target).float().mean().item()


def count(inputs: Any, target: Any) -> int:
    """What a mean loss is the mean over: examples, or the times of all of them."""
    return target.numel() if isinstance(target, Tensor) and target.dim() else batch_size(inputs)


def one_number(value: Any, function: str) -> float:
    """What a user's function returned. Raises TypeError where that is not one number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function} must return one number, such as a mean; it returns {got}") from error
