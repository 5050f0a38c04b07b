"""Run: what a runner, and a tuner in a loop of somebody else's, tell of themselves; reports and callbacks read it."""

from __future__ import annotations

from typing import Any

import torch

from fxstn.bilevel.history import History
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.totals import Metrics
from fxstn.bilevel.tuner import Tuner
from fxstn.bilevel.updates import Updates


class Run:
    """Base of whatever trains around a `Tuner`.

    stn: the network, or a problem of the user's own.
    settings: as texts.
    optimizers: by the name of their argument.
    """

    _tuner: Tuner
    stn: Any
    problem: BilevelProblem
    device: torch.device
    settings: dict[str, str]
    train_loader: Any
    valid_loader: Any
    metrics: Metrics
    updates: Updates
    optimizers: dict[str, torch.optim.Optimizer]
    history: History

    @property
    def steps(self) -> int:
        """Steps of w₀ done, without those that overflowed in float16; a cycle may span epochs."""
        return self._tuner.counters.steps

    @property
    def response_steps(self) -> int:
        """Response steps done; those along with steps of w₀ (method "stn") are not counted."""
        return self._tuner.counters.response_steps

    @property
    def hyper_steps(self) -> int:
        """Hyper steps done."""
        return self._tuner.counters.hyper_steps

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(epoch, text) of the signs of trouble so far, and of every time the run went back; those before a resume too."""
        return list(self._tuner.monitors.warnings)
