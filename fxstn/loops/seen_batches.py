"""The training batches of somebody else's loop: those of the step under way, and those of the last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from fxstn.bilevel.sources import new_pass

FIRST = 256  # batches that are kept before the first step, which says how many it takes


class RememberedBatches:
    """The training batches of the last steps.

    loader: where first ones come from. None: nowhere.
    count: how many are remembered.
    """

    def __init__(self, loader: Iterable[object] | None, count: int) -> None:
        self.loader, self.batches = loader, deque[object](maxlen=count)

    @property
    def remembers(self) -> bool:
        return bool(self.batches.maxlen) and bool(self.batches or self.loader is not None)

    def recent_or_first(self) -> Iterator[object]:
        if self.batches or self.loader is None:
            yield from self.batches
        else:
            yield from islice(new_pass(self.loader), self.batches.maxlen)


class SeenBatches:
    """The batches of the step of w₀ under way, as a loader yields them.

    passing: whether a pass over the loader is under way.
    most: batches of the largest step.
    late: steps of this epoch outside of a pass, as in a loop that takes batches ahead.
    """

    def __init__(self) -> None:
        self.passing, self.late = False, 0
        self._now, self._last = list[object](), list[object]()  # of the step under way, of the last one
        self.most = 0  # batches of one step

    def begin_pass(self) -> None:
        self.passing = True
        self._now.clear()

    def see(self, batch: object) -> None:
        """A batch that the step may train on, in a pass; no more are kept than the largest step had."""
        self.passing = True
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # the loop may take the labels out of its own
        self._now = [*self._now, batch][-(self.most or FIRST) :]

    def take(self) -> list[object]:
        """The batches of a step that is done; [] where none was seen.

        Where the loop has taken its last batches ahead, and its pass is over, they are those of the step before.
        """
        self.late += not self.passing
        ahead = self.late < self.most
        batches = self._now or (self._last if ahead else [])
        self._now, self._last, self.most = [], batches, max(self.most, len(batches))
        return batches
