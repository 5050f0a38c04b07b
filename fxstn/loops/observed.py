"""Sees the batches that a loader yields to somebody else's loop. The loader stays the object that it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from operator import call
from typing import Any, Protocol
from weakref import ref

from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.state import State

_LISTENER = "_fxstn_listener"
_CLASS: Any = vars(object)["__class__"]  # a class may have a property of that name, as accelerate's loaders have


class Listener(Protocol):
    """Hears of the passes over a loader. of: which pass it is."""

    def begin_pass(self, of: object) -> None: ...

    def see(self, batch: object, of: object) -> None: ...

    def leave_pass(self, of: object) -> None: ...

    def end_pass(self, of: object) -> None: ...


def can_be_observed(loader: object) -> bool:
    """Whether the passes over an object can be seen: not those over a list, say, which has no attributes."""
    return hasattr(loader, "__dict__") and hasattr(type(loader), "__iter__")


def _pass(loader: Any, kind: Any) -> Iterator[object]:
    """A pass over a loader, of which its listener hears. kind: the loader's own class."""
    listener = _listener_of(loader)
    if listener is None:  # a loader that was made from this one, or one that has outlived its tuner
        yield from kind.__iter__(loader)
        return
    of = object()
    listener.begin_pass(of)
    try:
        for batch in kind.__iter__(loader):
            now = _listener_of(loader)
            if now is not listener:  # one may leave within a pass, and another one come
                listener = now
                if listener is not None:
                    listener.begin_pass(of)
            if listener is not None:
                listener.see(batch, of)
            yield batch
    except GeneratorExit:
        if listener is not None:
            listener.leave_pass(of)
        raise
    if listener is not None and _listener_of(loader) is listener:
        listener.end_pass(of)


def observe(loader: Iterable[object], listener: Listener) -> None:
    """Tell a listener of every pass over a loader from now on.

    Raises ValueError where another listener hears of them.
    """
    if _listener_of(loader) is not None:
        gc.collect()  # a tuner that nobody has any more, as after an error in its loop, holds itself
        if _listener_of(loader) is not None:
            raise ValueError(
                "another tuner works with this train_loader, which may be one of an earlier cell that a variable still holds; "
                "call its detach() first, tuner.detach(), or make a loader of its own"
            )
    restore(loader)
    kind = type(loader)

    def begins(self: Any) -> Any:
        if (current := _listener_of(self)) is not None:
            current.begin_pass(self)
        return kind.__iter__(self)

    def following(self: Any) -> object:
        current = _listener_of(self)
        try:
            batch = kind.__next__(self)  # type: ignore[attr-defined]
        except StopIteration:
            if current is not None:
                current.end_pass(self)
            raise
        if current is not None:
            current.see(batch, self)
        return batch

    # an object that is its own iterator has one place, so that all who iterate over it are one pass
    own = hasattr(kind, "__next__")
    methods = {"__iter__": begins, "__next__": following} if own else {"__iter__": lambda self: _pass(self, kind)}
    names = {
        "__slots__": (),
        _LISTENER: True,
        **methods,
        "__reduce_ex__": _reduced,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    _CLASS.__set__(loader, type(kind.__name__, (kind,), names))
    vars(loader)[_LISTENER] = ref(listener)


def _listener_of(loader: object) -> Listener | None:
    """Who hears of the passes over a loader; None: nobody, or nobody any more. The optimizer of its loop keeps it."""
    reference: Callable[[], Listener | None] | None = vars(loader).get(_LISTENER)
    return None if reference is None or not _is_observed(loader) else reference()


def _is_observed(loader: object) -> bool:
    """Whether a loader tells of its passes: one that has taken over the attributes of another, as Fabric's do, does not."""
    return _LISTENER in vars(type(loader))


def restore(loader: Iterable[object]) -> None:
    """Give a loader its class back."""
    if vars(loader).pop(_LISTENER, None) is not None and _is_observed(loader):
        _CLASS.__set__(loader, type(loader).__bases__[0])


def _reduced(self: Any, protocol: int) -> tuple:
    """What pickle and copies make of a loader: one of its own class, that nobody hears of."""
    own, listener = type(self), vars(self).pop(_LISTENER)
    _CLASS.__set__(self, own.__bases__[0])
    try:
        function, arguments, *rest = self.__reduce_ex__(protocol)
        # by way of `call`, since pickle would compare the class that is made with that of the loader
        return call, (function, *arguments), *[dict(part) if isinstance(part, dict) else part for part in rest]
    finally:
        _CLASS.__set__(self, own)
        vars(self)[_LISTENER] = listener


class LoopLoaders:
    """The loaders of a loop. Their passes are seen or, where they cannot be, a pass of one's own goes beside them.

    A part with a state: where that pass is.

    loader: the loop's first. None: there is none.
    listener: hears of the passes.

    beside: the pass of one's own. None: there is none.
    """

    def __init__(self, loader: Iterable[object] | None, listener: Listener) -> None:
        self.listener, self.seen = listener, list[Iterable[object]]()
        self.beside: ResumableLoader | None = None
        if loader is not None and can_be_observed(loader):
            self.follow(loader)
        elif loader is not None:
            self.beside = ResumableLoader(loader, "train_loader")

    def follow(self, loader: Iterable[object]) -> None:
        """See the passes over a further loader. Raises ValueError where another listener hears of them."""
        if _listener_of(loader) is not self.listener:
            observe(loader, self.listener)
            self.seen.append(loader)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Inside, nobody hears of the passes: they are the tuner's own."""
        listeners = [vars(loader).pop(_LISTENER, None) for loader in self.seen]
        try:
            yield
        finally:
            for loader, listener in zip(self.seen, listeners, strict=True):
                if listener is not None:
                    vars(loader)[_LISTENER] = listener

    def restore(self) -> None:
        """Give the loaders their classes back."""
        for loader in self.seen:
            restore(loader)

    def state_dict(self) -> State:
        return {"beside": None if self.beside is None else self.beside.state_dict()}

    def load_state_dict(self, state: State) -> None:
        if self.beside is not None and state["beside"] is not None:
            self.beside.load_state_dict(state["beside"])


def known_length(loader: Iterable[object]) -> int:
    """The number of batches of a loader whose passes cannot be seen. Raises ValueError where it does not tell."""
    if not isinstance(loader, Sized):
        raise ValueError(
            f"the passes over train_loader, a {type(loader).__name__}, cannot be seen, and it has no length: give "
            "epoch_steps=, the optimizer steps between two evaluations"
        )
    return len(loader)
