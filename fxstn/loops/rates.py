"""The learning rates of somebody else's loop, step by step, and a scheduler that has a refit go through them again."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from torch.optim import Optimizer

from fxstn.bilevel.state import State

MOST = 256  # points that are kept of an epoch; beyond this, every second one is dropped


class EpochRates(TypedDict):
    """The learning rates of an epoch.

    steps: of the epoch.
    places: step numbers, from 0, at which rates were noted: where they changed.
    rates: those of all groups, one list for each place.
    """

    steps: int
    places: list[int]
    rates: list[list[float]]


def at_share(epoch: EpochRates, share: float) -> list[float]:
    """The rates at a share in [0, 1) of an epoch: between two steps, on the line between their rates."""
    step = share * epoch["steps"]
    index = bisect_right(epoch["places"], step + 1e-9) - 1
    before, now = epoch["places"][index], epoch["rates"][index]
    if index + 1 == len(epoch["places"]):
        return now
    gap, after = epoch["places"][index + 1] - before, epoch["rates"][index + 1]
    return [rate + (step - before) / gap * (other - rate) for rate, other in zip(now, after, strict=True)]


class SeenRates:
    """The learning rates that the groups have in the steps of each epoch.

    optimizers: of the loop.

    A rate that stays for some steps is noted at the first and at the last of them, so that a step of a schedule stays one.
    Rates on an accelerator are read in the first step of an epoch alone: the host would wait for them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.epochs: list[EpochRates] = []
        self._ended = True  # whether the next step begins an epoch

    def note(self) -> None:
        """Note the rates of a step, before it or right after it."""
        rates = [group["lr"] for part in self.optimizers for group in part.param_groups if "lr" in group]
        known = [] if self._ended else self.epochs[-1]["rates"][-1]
        waits = [isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates]
        now = [
            known[number] if wait and number < len(known) else float(rate)
            for number, (rate, wait) in enumerate(zip(rates, waits, strict=True))
        ]
        self._note(now)

    def _note(self, now: list[float]) -> None:
        if self._ended:
            self.epochs.append({"steps": 0, "places": [], "rates": []})
            self._ended = False
        epoch = self.epochs[-1]
        places, rates, step = epoch["places"], epoch["rates"], epoch["steps"]
        if len(rates) > 1 and rates[-1] == rates[-2] == now:
            places[-1] = step
        else:
            places.append(step)
            rates.append(now)
        if len(places) > MOST:
            del places[1:-1:2], rates[1:-1:2]
        epoch["steps"] += 1

    def end_epoch(self) -> None:
        """The next step begins an epoch."""
        self._ended = True

    @property
    def change(self) -> bool:
        """Whether a rate has changed."""
        rates = [each for epoch in self.epochs for each in epoch["rates"]]
        return any(each != rates[0] for each in rates)

    def state_dict(self) -> State:
        return {"epochs": _copy(self.epochs), "ended": self._ended}

    def load_state_dict(self, state: State) -> None:
        self.epochs, self._ended = _copy(state["epochs"]), state["ended"]


def _copy(epochs: list[EpochRates]) -> list[EpochRates]:
    """The same; the last one, which alone may still change, as a copy."""
    return [*epochs[:-1], *copy.deepcopy(epochs[-1:])]


class RatesAgain:
    """A scheduler by steps: rates as they were at this share of the training, and then as at its end.

    optimizer: whose groups are those of the loop.
    epochs: of `SeenRates`.
    steps: of the training to come, ≥ 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: list[EpochRates], steps: int) -> None:
        self.optimizer, self.epochs, self.steps, self.done = optimizer, epochs, steps, 0
        self.base_lrs = [1.0]  # a factor of all rates, under the name that `slow` looks for
        self._set()

    def _set(self) -> None:
        epoch, step = divmod(self.done * len(self.epochs), self.steps)
        last = epoch >= len(self.epochs)
        now = self.epochs[-1]["rates"][-1] if last else at_share(self.epochs[epoch], step / self.steps)
        for group, rate in zip(self.optimizer.param_groups, now, strict=False):
            group["lr"] = self.base_lrs[0] * rate

    def step(self) -> None:
        self.done += 1
        self._set()

    def state_dict(self) -> State:
        return {"done": self.done, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: State) -> None:
        self.done, self.base_lrs = state["done"], list(state["base_lrs"])
