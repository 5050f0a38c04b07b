"""The training batches of the last steps of somebody else's loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from fxstn.bilevel.sources import new_pass


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
