"""Sees the batches that a loader yields to somebody else's loop. The loader stays the object that it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

_LISTENER = "_fxstn_listener"
_CLASS: Any = vars(object)["__class__"]  # a class may have a property of that name, as accelerate's loaders have


class Listener(Protocol):
    """Hears of the passes over a loader."""

    def begin_pass(self) -> None: ...

    def see(self, batch: object) -> None: ...

    def end_pass(self) -> None: ...


def can_be_observed(loader: object) -> bool:
    """Whether the passes over an object can be seen: not those over a list, say, which has no attributes."""
    return hasattr(loader, "__dict__") and hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__next__")


def observe(loader: Iterable[object], listener: Listener) -> None:
    """Tell a listener of every pass over a loader from now on.

    Raises ValueError where another listener hears of them.
    """
    kind = type(loader)
    if _LISTENER in vars(loader):
        raise ValueError("another tuner works with this train_loader; call its detach() first")

    def passes(self: Any) -> Iterator[Any]:
        heard: Listener | None = vars(self).get(_LISTENER)
        if heard is None:  # a loader that was made from this one
            yield from kind.__iter__(self)
            return
        heard.begin_pass()
        for batch in kind.__iter__(self):
            heard.see(batch)
            yield batch
        heard.end_pass()

    names = {"__iter__": passes, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    _CLASS.__set__(loader, type(kind.__name__, (kind,), names))
    vars(loader)[_LISTENER] = listener


def restore(loader: Iterable[object]) -> None:
    """Give a loader its class back."""
    if vars(loader).pop(_LISTENER, None) is not None:
        _CLASS.__set__(loader, type(loader).__bases__[0])
