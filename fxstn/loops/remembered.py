"""The training batches of the last steps of somebody else's loop, by which its epochs are evaluated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import cast

from torch import Tensor

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.sources import length_of, new_pass
from fxstn.bilevel.state import State
from fxstn.loops.seen_batches import SeenBatches


class RememberedBatches:
    """The training batches of the last steps. Part of a tuner's state.

    loader: where first ones come from. None: nowhere.
    count: how many are remembered.
    to_come: returns how many the epoch under way will still bring, as far as is known. A state has what they will not replace.
    """

    def __init__(self, loader: Iterable[object] | None, count: int, to_come: Callable[[], int]) -> None:
        self.loader, self.batches, self.to_come = loader, deque[object](maxlen=count), to_come
        self._warned = False

    @property
    def remembers(self) -> bool:
        return bool(self.batches.maxlen) and bool(self.batches or self.loader is not None)

    def recent_or_first(self) -> Iterator[object]:
        if self.batches or self.loader is None:
            yield from self.batches
        else:
            yield from islice(new_pass(self.loader), self.batches.maxlen)

    def state_dict(self) -> State:
        """The batches that the evaluation of this epoch will need. Those that torch.load would refuse are left out."""
        count = max(0, (self.batches.maxlen or 0) - self.to_come())
        needed = list(self.batches)[-count:] if count else []
        plain = [batch for batch in needed if is_plain(batch)]
        if len(plain) < len(needed) and not self._warned:
            self._warned = True
            warn_caller(
                f"a state within an epoch has no batches of type {type(needed[-1]).__name__}: if a loop goes on from it, the "
                "epoch is evaluated by statistics of other batches; yield tensors, or lists and dicts of them"
            )
        return {"batches": plain}

    def load_state_dict(self, state: State) -> None:
        self.batches.clear()
        self.batches.extend(state["batches"])


def is_plain(batch: object) -> bool:
    """Whether a batch is made of tensors, numbers and strings, and of lists, tuples and dicts of them alone."""
    if type(batch) in (list, tuple):
        return all(map(is_plain, cast(Sequence[object], batch)))
    if type(batch) is dict:
        return all(map(is_plain, cast(dict, batch).values()))
    return batch is None or isinstance(batch, (Tensor, bool, int, float, str, bytes))


def batches_to_come(steps: int, seen: SeenBatches, loader: Iterable[object] | None, epoch_steps: int | None) -> int:
    """Batches that the epoch under way will still bring. 0 where nobody knows, or the loop has left its pass.

    steps: done in it.
    seen: says how many batches a step has.
    loader, epoch_steps: of `fxstn.tune`.
    """
    each = max(1, seen.most)
    if epoch_steps is not None:
        return each * (epoch_steps - steps)
    length = None if seen.left else length_of(loader)
    return 0 if length is None else max(0, length - max(seen.count, each * steps))
