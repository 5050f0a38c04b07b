"""Callbacks of a run: functions of the runner that are called after each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxstn.bilevel.checks import check_settings, plain_number
from fxstn.bilevel.history import History


class HasHistory(Protocol):
    """What a callback sees of a BilevelRunner, and of the tuner that `fxstn.tune` returns."""

    @property
    def history(self) -> History: ...


class Stoppable(HasHistory, Protocol):
    """What a callback sees of a BilevelRunner alone."""

    def stop(self) -> None: ...


@dataclass(frozen=True)
class EarlyStopping:
    """`BilevelRunner(callbacks=[fxstn.EarlyStopping(patience=10)])` ends a run that no longer gets better.

    patience: ≥ 1, number of epochs without a better validation loss.

    It reads the history, so that a run that it has ended stays ended when it resumes.

    Raises TypeError for a patience that is no number, ValueError for one out of range.
    """

    patience: int

    def __post_init__(self) -> None:
        check_settings({"patience": self.patience})
        object.__setattr__(self, "patience", plain_number("patience", self.patience))

    def __call__(self, runner: Stoppable) -> None:
        """After an epoch."""
        history = runner.history
        if len(history) and len(history) - history.best()["epoch"] >= self.patience:
            runner.stop()

    def on_fit_start(self, runner: Stoppable) -> None:
        """After a resume, before the first epoch of `fit`. runner: the run."""
        self(runner)
