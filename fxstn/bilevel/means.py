"""Means: of the losses of an epoch under way, of a metric over examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.state import State, on_device
from fxstn.ops.batch_axis import batch_size

Metrics = dict[str, Callable[[Any, Any], SupportsFloat]]  # {name: f(output, target) → number}


class RunningMeans:
    """Mean losses of the epoch under way, and its time. A part with a state in each process.

    device: where sums are loaded to, and averaged over the processes.

    `steps` is the number of inner steps of the epoch; 0 between two epochs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget everything: an epoch begins, or is over."""
        self.steps, self._seconds = 0, 0.0  # seconds before the process was cut
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._start = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one step, which stay on their device."""
        for name, loss in losses.items():
            self._totals[name] = self._totals[name] + loss if name in self._totals else 0.0 + loss
            self._counts[name] = self._counts.get(name, 0) + 1
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The mean of each loss over the steps that had it, and over the processes."""
        return distributed.mean(
            {name: total.item() / self._counts[name] for name, total in self._totals.items()}, self.device
        )

    def elapsed(self) -> float:
        """Seconds of the epoch so far."""
        return self._seconds + time.perf_counter() - self._start

    def state_dict(self) -> State:
        return {
            "steps": self.steps,
            "totals": dict(self._totals),
            "counts": dict(self._counts),
            "seconds": self.elapsed() if self.steps else 0.0,
        }

    def load_state_dict(self, state: State) -> None:
        self.begin()
        self.steps, self._seconds = state["steps"], state["seconds"]
        self._totals, self._counts = on_device(dict(state["totals"]), self.device), dict(state["counts"])

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        self.begin()


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of examples whose largest logit is the target class; in [0, 1]. output: (batch, classes), target: (batch,)."""
    return (output.argmax(-1) == target).float().mean().item()


def example_count(inputs: object, target: object) -> int:
    """What a mean loss is the mean over: the entries of the target, one per example or per time of an example."""
    return target.numel() if isinstance(target, Tensor) and target.dim() else batch_size(inputs)


def one_number(value: object, function: str) -> float:
    """The number that a user's function returned. Raises TypeError where it is not one number.

    function: what the error calls it.
    """
    cause: Exception | None = None
    if isinstance(value, SupportsFloat):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            cause = error
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{function} must return one number, such as a mean; it returns {kind}") from cause
