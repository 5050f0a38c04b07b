"""Optimizers and schedulers as they were when a run began, for its refit."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxstn.bilevel.combined import CombinedOptimizer
from fxstn.bilevel.records import Scheduler, options_of
from fxstn.bilevel.state import State
from fxstn.bilevel.updates import SchedulerFactories


def without_state(optimizer: Optimizer, groups: Sequence[State]) -> Optimizer:
    """An optimizer of the same class over the same parameters that has not stepped yet, and knows no hook.

    groups: the options of each group, such as `options_of` returns before the first step.
    """
    if isinstance(optimizer, CombinedOptimizer):
        counts, parts = [len(part.param_groups) for part in optimizer.parts], []
        for part, count in zip(optimizer.parts, counts, strict=True):
            parts.append(without_state(part, groups[:count]))
            groups = groups[count:]
        return CombinedOptimizer(parts)
    result: Optimizer = object.__new__(type(optimizer))
    inner = {name: part for name, part in vars(optimizer).items() if isinstance(part, Optimizer)}
    own = {name: value for name, value in vars(optimizer).items() if name != "step" and "_hooks" not in name}
    vars(result).update(own | {name: without_state(part, options_of(part)) for name, part in inner.items()})
    anew = [
        {**copy.deepcopy(options), "params": list(group["params"])}  # a rate may be a tensor, which schedulers write to
        for options, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    result.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": anew})
    return result


def checked_factory(factory: Callable[[Any], Any], own: Optimizer) -> Callable[[Any], Any]:
    """A factory of optimizers that raises ValueError where it returns the one that the run steps with, or a part of it."""
    of_run = {id(own), *map(id, getattr(own, "parts", ()))}

    def make(parameters: Any) -> Any:
        result = factory(parameters)
        if of_run & {id(part) for part in (result if isinstance(result, (list, tuple)) else (result,))}:
            raise ValueError("optimizer= returns the optimizer that the run steps with, whose state a refit would change: "
                             "make a new one at each call")  # fmt: skip
        return result

    return make


class Stretched:
    """A scheduler that takes its steps within another number of steps of its optimizer.

    ratio: its steps to those of the optimizer.
    """

    def __init__(self, scheduler: Scheduler, ratio: float) -> None:
        self.ratio, self.calls, self.done = ratio, 0, 0
        self._schedulers = [scheduler]  # where `OptimizerRecord` looks for parts

    def step(self) -> None:
        self.calls += 1
        while self.done < math.floor(self.calls * self.ratio + 1e-6):
            self.done += 1
            self._schedulers[0].step()

    def state_dict(self) -> State:
        return {"calls": self.calls, "done": self.done, "_schedulers": [self._schedulers[0].state_dict()]}

    def load_state_dict(self, state: State) -> None:
        self.calls, self.done = state["calls"], state["done"]
        self._schedulers[0].load_state_dict(state["_schedulers"][0])


class OnLosses:
    """A ReduceLROnPlateau that steps on validation losses which are known already, the last of them again and again."""

    def __init__(self, scheduler: ReduceLROnPlateau, losses: Sequence[float]) -> None:
        self.losses, self.epoch = list(losses), 0
        self._schedulers = [scheduler]

    def step(self) -> None:
        self._schedulers[0].step(self.losses[min(self.epoch, len(self.losses) - 1)])
        self.epoch += 1

    def state_dict(self) -> State:
        return {"epoch": self.epoch, "_schedulers": [self._schedulers[0].state_dict()]}

    def load_state_dict(self, state: State) -> None:
        self.epoch = state["epoch"]
        self._schedulers[0].load_state_dict(state["_schedulers"][0])


def of_weights(factories: SchedulerFactories, change: Callable[[Any], Scheduler]) -> SchedulerFactories:
    """The scheduler of w₀ alone, changed."""
    if factories is None or "optimizer" not in factories:
        return None
    factory = factories["optimizer"]
    return {"optimizer": lambda optimizer: change(factory(optimizer))}
