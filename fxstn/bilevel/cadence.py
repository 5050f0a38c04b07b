"""Cadence: when response and hyper steps are due. They become rarer as the rate of λ's optimizer falls."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch.optim import Optimizer

from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.settings import HyperSettings, ResponseSettings
from fxstn.bilevel.state import State
from fxstn.ir.cost import RAMP


@dataclass
class Counters:
    """What a run has done so far: inner steps, response steps alone, hyper steps, and how often it went back.

    A step whose gradient overflowed in float16 is none.

    cycle: inner steps since the last cycle was over.
    since_response: inner steps since the last response step was due.
    """

    steps: int = 0
    response_steps: int = 0
    hyper_steps: int = 0
    rollbacks: int = 0
    cycle: int = 0
    since_response: int = 0

    def state_dict(self) -> State:
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Cadence:
    """The number of inner steps from one response step, or hyper step, to the next.

    response, hyper: of the run.
    optimizer: of λ. None: there is none.
    counters: of the run, on which alone the numbers depend: a resumed run goes on as it would have.

    After n hyper steps the rate of a `SettlingAdam` is 1/√(1 + n/settle) of its first. Cycles, and the intervals of response
    steps, are then √(n/settle) times as long as at first, where that is more than 1, until a cycle has hyper.longest_cycle
    inner steps: a λ that moves less has less to ask of Θ and of the validation data. In its first steps, in which it crosses
    its range, they stay as they are. S inner steps bring about S^⅔ hyper steps, so the share of the time that tuning takes
    falls as S^-⅓. With an optimizer whose rate does not fall by itself, intervals do not grow.

    Response steps begin at every inner step and become rarer by one step after each `RAMP` inner steps: Θ has everything to
    learn at first, where λ moves furthest.
    """

    def __init__(
        self, response: ResponseSettings, hyper: HyperSettings, optimizer: Optimizer | None, counters: Counters
    ) -> None:
        self.response, self.hyper, self.optimizer, self.counters = response, hyper, optimizer, counters

    def _slowness(self) -> float:
        """How many times as long as at first the intervals are."""
        if not isinstance(self.optimizer, SettlingAdam):
            return 1.0
        settled = self.counters.hyper_steps / self.optimizer.param_groups[0]["settle"]
        return max(1.0, min(math.sqrt(settled), self.hyper.longest_cycle / self.hyper.train_steps))

    @property
    def cycle_length(self) -> int:
        """Inner steps of the cycle under way."""
        return round(self.hyper.train_steps * self._slowness())

    @property
    def response_interval(self) -> int:
        """Inner steps from the last response step to the next. Windows that share ε need one at each."""
        if self.response.windows > 1:
            return 1
        return min(1 + self.counters.steps // RAMP, round(self.response.every * self._slowness()))

    @property
    def ends_cycle_soon(self) -> bool:
        """Whether the next inner step is among the last hyper.train_steps of its cycle, whose gradients the hyper step reads.

        They are as many however long the cycle is: the noise of their mean is that of the short cycle, and Θ and the weights,
        to which they belong, are nearer to those of the hyper step.
        """
        return self.cycle_length - self.counters.cycle <= self.hyper.train_steps

    def count(self) -> tuple[bool, bool]:
        """Count an inner step: whether a response step is due now, and whether the cycle is over."""
        counters = self.counters
        counters.steps += 1
        counters.cycle += 1
        counters.since_response += 1
        over = counters.cycle >= self.cycle_length
        if over:
            counters.cycle = 0
        return counters.since_response >= self.response_interval, over

    def count_response(self) -> None:
        """Count a response step. One that comes late, because others overflowed, does not put off the next."""
        self.counters.response_steps += 1
        self.counters.since_response %= self.response_interval


def steps_of_run(inner: int) -> tuple[int, int]:
    """(response steps, hyper steps) of the first so many inner steps, with default settings."""
    counters = Counters()
    cadence = Cadence(ResponseSettings(), HyperSettings(), SettlingAdam([torch.zeros(1)]), counters)
    for _ in range(inner):
        responds, over = cadence.count()
        if responds:
            cadence.count_response()
        counters.hyper_steps += over
    return counters.response_steps, counters.hyper_steps
