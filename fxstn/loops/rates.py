"""The learning rates of somebody else's loop, epoch by epoch, and a scheduler that has a refit go through them again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch.optim import Optimizer

from fxstn.bilevel.state import State


class SeenRates:
    """The learning rate of each group, at the beginning and at the end of each epoch.

    optimizers: of the loop.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.epochs: list[list[list[float]]] = []  # (begin, end) of each epoch, by group

    def _now(self) -> list[float]:
        return [float(group["lr"]) for part in self.optimizers for group in part.param_groups if "lr" in group]

    def note(self, first: bool) -> None:
        """Note the rates.

        first: whether an epoch begins; else it ends.
        """
        now = self._now()
        if first:
            self.epochs.append([now, now])
        elif self.epochs:
            self.epochs[-1][1] = now

    @property
    def change(self) -> bool:
        """Whether a rate has changed."""
        rates = list(chain.from_iterable(self.epochs))
        return any(each != rates[0] for each in rates)

    def state_dict(self) -> State:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: State) -> None:
        self.epochs = state["epochs"]


class RatesAgain:
    """A scheduler by steps: rates as they were at this share of each epoch, and after the last epoch as at its end.

    optimizer: whose groups are those of the loop.
    epochs: of `SeenRates`.
    steps: of an epoch, ≥ 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: list[list[list[float]]], steps: int) -> None:
        self.optimizer, self.steps, self.done = optimizer, steps, 0
        self.groups = len(epochs[0][0])
        self.base_lrs = [rate for epoch in epochs for end in epoch for rate in end]  # the name that `slow` looks for
        self._set()

    def _set(self) -> None:
        size = 2 * self.groups
        place = min(self.done / self.steps, len(self.base_lrs) // size - 1e-9)
        epoch, share = int(place), place - int(place)
        now = self.base_lrs[size * epoch : size * (epoch + 1)]
        for group, begin, end in zip(self.optimizer.param_groups, now[: self.groups], now[self.groups :], strict=False):
            group["lr"] = begin + share * (end - begin)

    def step(self) -> None:
        self.done += 1
        self._set()

    def state_dict(self) -> State:
        return {"done": self.done, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: State) -> None:
        self.done, self.base_lrs = state["done"], list(state["base_lrs"])
