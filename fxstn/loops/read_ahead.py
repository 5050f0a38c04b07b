"""Loops that read batches ahead, as a prefetcher does, and train on them later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fxstn.bilevel.state import State


class ReadAhead:
    """Hands on the batches of a pass when the loop is to train on them. A part of a tuner's state.

    forwards: function → how many forwards of training the model has had.

    A loop that is n batches ahead trains on n of them after the end of the pass. So a pass shows what the next one needs.
    """

    def __init__(self, forwards: Callable[[], int]) -> None:
        self.forwards = forwards
        self.batches = 0  # that the loop is ahead in this pass
        self._next = 0  # in the next one
        self._waiting = deque[object]()
        self._count = self._begin = self._end = self._last = (
            0  # batches; forwards at the pass's ends and the last late step
        )

    def __bool__(self) -> bool:
        """Whether the loop has batches that it has not trained on."""
        return bool(self._waiting)

    def begin_pass(self) -> None:
        self.batches, self._count, self._begin = self._next, 0, self.forwards()
        self._waiting.clear()

    def read(self, batch: object) -> list[object]:
        """The batch that the loop is to train on, now that it has read another one; none at the beginning."""
        self._count += 1
        self._waiting.append(batch)
        return [self._waiting.popleft()] if len(self._waiting) > self.batches else []

    def end_pass(self) -> None:
        self._end = self._last = self.forwards()
        self._next = 0 if self._end > self._begin else self._next  # without a forward it is no pass of training

    def late(self) -> list[object]:
        """The batches of a step after the end of a pass."""
        now = self.forwards()
        of_batch = (now - self._begin) / max(1, self._count)
        if not of_batch:
            return []
        ahead, fresh = (round((now - before) / of_batch) for before in (self._end, self._last))
        self._last = now
        self._next = ahead if 2 * ahead <= self._count else 0  # more: the loop does not read them from the loader
        return [self._waiting.popleft() for _ in range(min(fresh, len(self._waiting)))]

    def state_dict(self) -> State:
        return {"next": self._next}

    def load_state_dict(self, state: State) -> None:
        self.batches = self._next = state["next"]
