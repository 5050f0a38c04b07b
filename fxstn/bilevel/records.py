"""Records of optimizers: their settings as the script gives them, and what a checkpoint of other settings becomes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxstn.bilevel.optim import SettlingAdam, learning_rate
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.state import State, Stateful

SCHEDULES = ("schedulers", "step_schedulers")
# Where torch's schedulers keep rates: in the groups of their optimizer (initial_lr; OneCycleLR's others) or in a list each.
_RATES = {"lr", "initial_lr", "min_lr", "max_lr", "base_lrs", "max_lrs"}
_KERNELS = {"foreach", "fused", "capturable", "differentiable"}  # how torch computes a step, not which
_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class Scheduler(Stateful, Protocol):
    """Such as those of torch.optim.lr_scheduler."""

    @property
    def step(self) -> Callable[..., object]: ...


def equal(one: object, other: object) -> bool:
    """Whether two structures hold the same, NaN and tensors included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (one != one and other != other)


def options_of(optimizer: Optimizer) -> list[State]:
    """The options of each group: all but its parameters."""
    return [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def _with_parts(scheduler: object) -> Iterator[object]:
    """A scheduler and those that it is made of, such as a SequentialLR's."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings of a scheduler in both states that differ, those of its parts included, as texts."""
    result = []
    for key, value in ours.items():
        old = theirs.get(key)
        if key == "_schedulers" and isinstance(old, list):
            result += [text for pair in zip(value, old, strict=False) for text in _differences(*pair)]
        elif not key.startswith("_") and key != "base_lrs" and not equal(value, old):
            result.append(f"{key}={value} (was {old})")
    return result


class OptimizerRecord:
    """An optimizer with its schedulers: its settings when the runner was made, and how far its schedules are.

    schedulers: {one of `SCHEDULES`: the scheduler}, those it has.

    The state is `initial`, the settings; the steps done; the validation losses at which a scheduler of epochs stepped; and by
    what `slow` has multiplied the rates.
    """

    def __init__(self, name: str, optimizer: Optimizer, schedulers: dict[str, Scheduler]) -> None:
        self.name, self.optimizer, self.schedulers = name, optimizer, schedulers
        self.steps, self.factor = 0, 1.0
        self.valid_losses: list[float] = []
        states = {kind: copy.deepcopy(scheduler.state_dict()) for kind, scheduler in schedulers.items()}
        shapes = [[tuple(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
        options = {"groups": options_of(optimizer), "shapes": shapes}
        self.initial: State = plain_numbers({"type": type(optimizer).__name__, **options, "schedules": states})

    def parts(self) -> dict[str, Stateful]:
        """{kind of part in `Updates`: part} of this optimizer."""
        return {"optimizers": self.optimizer, **self.schedulers, "records": self}

    def step(self) -> None:
        """A step of the optimizer is done: its step scheduler follows."""
        self.steps += 1
        if "step_schedulers" in self.schedulers:
            self.schedulers["step_schedulers"].step()

    def end_epoch(self, valid_loss: float) -> None:
        """An epoch is done: its scheduler follows, ReduceLROnPlateau with the validation loss."""
        if (scheduler := self.schedulers.get("schedulers")) is not None:
            self.valid_losses.append(valid_loss)
            scheduler.step(*([valid_loss] if isinstance(scheduler, ReduceLROnPlateau) else []))

    def slow(self, factor: float) -> float:
        """Multiply the learning rate, and the rates that its schedulers start from and go to; returns the new one."""
        tables: list[dict[str, Any]] = list(self.optimizer.param_groups)
        for scheduler in self.schedulers.values():
            tables += [vars(part) for part in _with_parts(scheduler)]
        for table in tables:
            for key in _RATES & table.keys():
                rate = table[key]
                table[key] = [factor * each for each in rate] if isinstance(rate, list) else factor * rate
        self.factor *= factor
        return learning_rate(self.optimizer)

    def state_dict(self) -> State:
        return {
            "initial": self.initial,
            "steps": self.steps,
            "valid_losses": list(self.valid_losses),
            "factor": self.factor,
        }

    def load_state_dict(self, state: State) -> None:
        self.steps, self.factor = state["steps"], state["factor"]
        self.valid_losses = list(state["valid_losses"])

    # Settings that have changed

    def is_alike(self, saved: State) -> bool:
        """Whether saved states are of an optimizer and schedulers of these types. saved: {kind: state} for each of `parts`."""
        return saved.keys() == self.parts().keys() and saved["records"]["initial"]["type"] == self.initial["type"]

    def adapt(self, saved: State) -> tuple[State, list[str]]:
        """Saved states with the settings of this run; and texts of what it takes anew.

        saved: {kind: state} for each of `parts`.

        A setting that the script gives as before goes on from the file. One that it gives anew is taken. A schedule of which
        something has changed is where it would be if it had been so from the start.

        Raises ValueError where the schedule cannot have come so far.
        """
        optimizer, record = saved["optimizers"], saved["records"]
        theirs = record["initial"]
        if equal(theirs, self.initial):
            return saved, []
        if theirs["shapes"] != self.initial["shapes"]:
            raise ValueError(f"{self.name} over its parameters in another order; give them in that order, or choose another "
                             "out_dir")  # fmt: skip
        changes, texts = self._changed_options(theirs["groups"], optimizer["param_groups"])
        groups = [group | new for group, new in zip(optimizer["param_groups"], changes, strict=True)]
        averages = optimizer["state"]
        if not isinstance(self.optimizer, SettlingAdam) and self._switched(changes, theirs["groups"]):
            averages, texts = {}, [*texts, "its averages begin anew"]
        if any("lr" in new for new in changes):
            record = record | {"factor": 1.0}
        schedules = {kind: saved[kind] for kind in self.schedulers}
        if not equal(theirs["schedules"], self.initial["schedules"]):
            kinds = self.initial["schedules"].items()
            settings = [text for kind, ours in kinds for text in _differences(ours, theirs["schedules"][kind])]
            texts.append(f"its schedule as if from the start{''.join(f', {text}' for text in settings)}")
            scheduled, schedules = self._replayed(record)
            groups = [group | new for group, new in zip(groups, scheduled, strict=True)]
        state = {"state": averages, "param_groups": groups}
        return {"optimizers": state, "records": record, **schedules}, texts

    def _changed_options(self, theirs: list[State], now: list[State]) -> tuple[list[State], list[str]]:
        """The options of each group that the script gives anew, and as texts."""
        changes, texts = [], []
        for ours, old, last in zip(self.initial["groups"], theirs, now, strict=True):
            new = {key: value for key, value in ours.items() if key not in old or not equal(value, old[key])}
            changes.append(new)
            for key in new.keys() - _KERNELS - (_RATES - {"lr"}):
                became = "" if equal(last.get(key), old.get(key)) else f", {last.get(key)} by now"
                texts.append(f"{key}={new[key]} (was {old.get(key)}{became})")
        return changes, sorted(set(texts))

    @staticmethod
    def _switched(changes: list[State], theirs: list[State]) -> bool:
        """Whether an option is switched on or off, such as amsgrad: the averages that it needs may not be in the file."""
        switches = [(bool(value), bool(old.get(key))) for new, old in zip(changes, theirs, strict=True)
                    for key, value in new.items() if key not in _KERNELS | {"weight_decay"}]  # fmt: skip
        return any(new != old for new, old in switches)

    def _replayed(self, record: State) -> tuple[list[State], State]:
        """What the schedulers set in the groups, and their states, after the steps of a record with this run's settings."""
        before = options_of(self.optimizer), {k: copy.deepcopy(s.state_dict()) for k, s in self.schedulers.items()}
        own = self.steps, self.factor, self.valid_losses
        try:
            self._set(copy.deepcopy(self.initial["groups"]), copy.deepcopy(self.initial["schedules"]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would remark that the optimizer does not step in between
                self._run(record["steps"], record["valid_losses"])
            self.slow(record["factor"])
            after = options_of(self.optimizer)
            scheduled = [
                {key: value for key, value in now.items() if key == "lr" or not equal(value, first[key])}
                for now, first in zip(after, self.initial["groups"], strict=True)
            ]
            return scheduled, {kind: copy.deepcopy(s.state_dict()) for kind, s in self.schedulers.items()}
        except _ERRORS as error:
            done = f"{len(record['valid_losses'])} epochs" if record["valid_losses"] else f"{record['steps']} steps"
            raise ValueError(f"{done} of {self.name}, which its new schedule cannot follow ({error}); give one that is longer, "
                             "or that of the run before") from error  # fmt: skip
        finally:
            self._set(*before)
            self.steps, self.factor, self.valid_losses = own

    def _run(self, steps: int, valid_losses: list[float]) -> None:
        """Step the schedulers as in a run of so many steps and epochs."""
        self.steps, self.valid_losses = 0, []
        for number, loss in enumerate(valid_losses, 1):
            while self.steps < steps * number // len(valid_losses):
                self.step()
            self.end_epoch(loss)
        while "step_schedulers" in self.schedulers and self.steps < steps:
            self.step()

    def _set(self, groups: list[State], schedules: State) -> None:
        for kind, scheduler in self.schedulers.items():
            scheduler.load_state_dict(schedules[kind])
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):
            group |= options
