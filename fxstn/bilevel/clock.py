"""Clock: the time that a run takes in `fit`, which limits it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fxstn.bilevel.state import State


class Clock:
    """The seconds that a run has spent in `fit`, those before a resume too. A part with a state in each process.

    All that happens there counts: steps, evaluation, callbacks, waits for files, and epochs that a run went back on.
    """

    def __init__(self) -> None:
        self._before = 0.0  # seconds until `_start`
        self._start: float | None = None  # None: it stands still

    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, time counts."""
        self._start = time.monotonic()
        try:
            yield
        finally:
            self._before, self._start = self.seconds(), None

    def state_dict(self) -> State:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state. Time never goes back, as where a run goes back to an earlier state of its own."""
        self._before = max(self.seconds(), state["seconds"])
        if self._start is not None:
            self._start = time.monotonic()

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        self.load_state_dict(state)
