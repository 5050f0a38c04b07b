"""What goes wrong in a run: losses that are no numbers, and signals that ask it to end."""

from __future__ import annotations

import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fxstn.bilevel.state import State

EXPLODED = 1e4  # a loss so many times as large as at first, or as 1, is one that training cannot bring down
OFFENDERS = {  # the optimizers whose rates a bad loss speaks against
    "train_loss": ("optimizer",),
    "valid_loss": ("optimizer",),
    "response_loss": ("response_optimizer",),
    "hyper_loss": ("response_optimizer", "hyper_optimizer"),
}


class DivergedError(RuntimeError):
    """A loss became NaN, infinite or huge, and again after the run went back. The best model so far is kept."""


class RunWarning(UserWarning):
    """A sign that a run goes wrong, with the remedy."""


def warn_caller(text: str, category: type[Warning] = RunWarning) -> None:
    """Warn at the line of the user's code that called fxstn."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "fxstn":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


class BadLoss(Exception):
    """A loss is no number, or huge. The runner catches it: the run goes back, or raises DivergedError.

    name: of the loss.
    time: epoch and step.
    """

    def __init__(self, name: str, value: float, time: str) -> None:
        super().__init__(f"{name} became {value:.6g} in {time}")
        self.name = name


class LossGuard:
    """Raises BadLoss for a loss that is not finite, or `EXPLODED` times its first value."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}  # the first value of each loss

    def check(self, losses: dict[str, float], time: str) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss) or abs(loss) > EXPLODED * max(1.0, abs(self.first.setdefault(name, loss))):
                raise BadLoss(name, loss, time)

    def state_dict(self) -> State:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: State) -> None:
        self.first = dict(state["first"])


class Stop:
    """The wish that SIGTERM or Ctrl-C expresses: the run saves and ends at the next step. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that came; None: none

    @contextmanager
    def on_signals(self, enabled: bool) -> Iterator[None]:
        """Inside, signals are noted. Python lets only the main thread handle signals; elsewhere nothing changes."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (int(signal.SIGINT), int(signal.SIGTERM))}

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number] or signal.SIG_DFL)

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def end(self) -> None:
        """Raise what the signal would have raised, or SystemExit with the shell's status for SIGTERM."""
        number, self.signal = self.signal, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(number or signal.SIGTERM))
