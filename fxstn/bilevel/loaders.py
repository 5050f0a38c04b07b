"""ResumableLoader: passes over a loader, whose place in a pass can be saved and restored."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.sources import (
    SAMPLERS,
    StatefulLoader,
    checksum,
    equal_states,
    generator_state,
    generators_of,
    is_stateful,
    lacks_generator,
    length_of,
    may_draw,
    new_pass,
    place_of,
    set_epoch,
    set_generator_state,
)
from fxstn.bilevel.state import State
from fxstn.bilevel.workers import batches_of
from fxstn.ir.generators import GlobalRandomState


class ResumableLoader:
    """Passes over a loader, whose place can be saved and restored. A part with a state in each process.

    name: what errors call the loader.
    remember: the number of batches kept in `recent`, the last ones of this pass, as the loader gave them.

    A pass is restored by another pass from the same states of all generators, up to the number of batches taken. For this, the
    batches after the first one draw from global generators of their own, seeded from the states at the start of the pass: they
    do not depend on what training draws between them. Other passes share the generators that the loader holds
    (`generators_of`), so their states are noted before a batch that draws after another pass did.

    A loader that saves its place itself does so. Its set_epoch, and that of its samplers and data sets, gets the number of the
    pass, from 0.
    """

    def __init__(self, loader: Iterable[object], name: str, remember: int = 0) -> None:
        self.loader, self.name = loader, name
        self.recent: deque[object] = deque(maxlen=remember)
        self._batches: Iterator[object] | None = None
        self._passes = self._position = 0
        self._start: State = {}  # states of all generators at the start of the pass
        self._generators: dict[str, Any] = {}
        self._states: State = {}  # of the loader's generators, after the last batch
        self._jumps: list[tuple[int, State]] = []  # (batches taken, states of the loader's generators before the next)
        self._stream: GlobalRandomState | None = None  # of the global generators, for the next batch
        self._first_checksum = ""
        self._last: object = None
        self._end: object = None  # where a stateful loader was after its last pass
        self._places: deque[State] = deque(maxlen=max(1, remember))  # before the last batches, of a stateful loader
        self._warned = False

    @property
    def remembers(self) -> bool:
        """Whether batches are kept in `recent`."""
        return bool(self.recent.maxlen)

    def recent_or_first(self) -> Iterator[object]:
        """The recent batches; before there is one, as many first ones of another pass."""
        yield from self.recent or itertools.islice(new_pass(self.loader), self.recent.maxlen)

    @property
    def last(self) -> object:
        """The batch that was taken last, also after going on from a state. None: there was none."""
        return self._last

    @property
    def open(self) -> bool:
        """Whether a pass has begun and was not closed."""
        return self._batches is not None

    def begin(self) -> None:
        """Begin a pass."""
        set_epoch(self.loader, self._passes)
        self._generators = generators_of(self.loader)
        self._states = self._own_states()
        self._open({"random": GlobalRandomState.current().state_dict(), "own": self._states})

    def _open(self, start: State) -> None:
        """Begin a pass; start: the states of all generators."""
        self._start, self._position = start, 0
        self._places.clear()
        if is_stateful(self.loader):  # one that was not read yet may draw to tell its place
            self._places.append(
                self._place(self.loader) if self._passes else {"taken": 0, "loader": None, "own": self._states}
            )
        self._stream = self._seeded_stream() if may_draw(self.loader) else None
        self._passes += 1
        self._batches = batches_of(self.loader) if is_stateful(self.loader) else new_pass(self.loader)
        self._jumps, self._first_checksum, self._last = [], "", None
        self.recent.clear()

    def end(self) -> None:
        """Take no more batches of this pass. It stays open for what reads its recent ones, also after going on from a state."""
        self._batches = iter(())

    def close(self) -> None:
        """End this pass, and what reads its recent batches."""
        if self.open and is_stateful(self.loader):  # now: with or without a state to be saved it draws the same
            self._end = place_of(self.loader)
        self._batches = None

    def take(self, n: int = 1) -> list[object]:
        """The next n batches of this pass; fewer, or none, at its end."""
        assert self._batches is not None
        batches: list[object] = []
        while len(batches) < n and (drawn := self._draw()):
            batches += drawn
        if not batches:
            self.end()
        return batches

    def next(self) -> tuple[object, bool]:
        """The next batch, and whether it is the first of a pass; a pass that is over is followed by another.

        Raises ValueError where the loader yields no batch.
        """
        if not self.open or not (batches := self.take()):
            self.begin()
            batches = self.take()
        if not batches:
            raise ValueError(f"{self.name} is empty: it yielded no batch")
        return batches[0], self._position == 1

    def _draw(self) -> list[object]:
        """The next batch alone; [] at the end of the pass."""
        assert self._batches is not None
        before = self._own_states()
        places = [self._place(self.loader)] if is_stateful(self.loader) and self._position else []
        with self._streamed():
            batches = list(itertools.islice(self._batches, 1))
        self._places.extend(places[: len(batches)])
        after = self._own_states()
        if not equal_states(before, self._states) and not equal_states(after, before):
            self._jumps.append((self._position, before))
        self._states = after
        for batch in batches:
            self._first_checksum = self._first_checksum or checksum(batch)
            self._last = batch
        self._position += len(batches)
        self.recent.extend(batches)
        return batches

    @contextlib.contextmanager
    def _streamed(self) -> Iterator[None]:
        """Inside, the global generators are those of the pass; at its first batch those of training."""
        if self._stream is None or not self._position:
            yield
            return
        outside = GlobalRandomState.current()
        self._stream.set()
        try:
            yield
        finally:
            self._stream = GlobalRandomState.current()
            outside.set()

    def _seeded_stream(self) -> GlobalRandomState:
        """Global generators for a pass, seeded from the states at its start."""
        digest = hashlib.sha256(f"{self.name} {self._passes}".encode())
        for leaf in tree_leaves(self._start):
            digest.update(leaf.numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
        return GlobalRandomState.seeded(int.from_bytes(digest.digest()[:4], "little"))

    def _own_states(self) -> State:
        return {path: generator_state(generator) for path, generator in self._generators.items()}

    def _set_own(self, states: State) -> list[str]:
        """Set the loader's generators; returns the paths at which there is none."""
        own = generators_of(self.loader)
        for path in states.keys() & own.keys():
            set_generator_state(own[path], states[path])
        return sorted(states.keys() - own.keys())

    def state_dict(self) -> State:
        over = self._passes and not self.open
        return {
            "open": self.open,
            "passes": self._passes,
            "taken": self._position,
            "start": self._start,
            "own": {path: generator_state(generator) for path, generator in generators_of(self.loader).items()},
            "jumps": list(self._jumps),
            "checksums": [self._first_checksum, checksum(self._last)],
            "length": length_of(self.loader),
            "stateful": is_stateful(self.loader),
            "place": self._places[0] if self._places else None,  # from where the recent batches are read again
            "end": self._end if over else None,
        }

    def load_state_dict(self, state: State) -> None:
        before = GlobalRandomState.current()
        self._passes, self._batches = 0, None
        equal = self._resume(state) if state["passes"] else True
        missing = self._set_own(state["own"])
        before.set()
        if (not equal or missing) and not self._warned:
            self._warned = True
            warn_caller(self._difference(missing))

    def _place(self, loader: StatefulLoader) -> State:
        """Where a loader that saves its place itself is."""
        stream = self._stream.state_dict() if self._stream is not None and self._position else None
        return {"taken": self._position, "loader": place_of(loader), "stream": stream, "own": self._own_states()}

    def _resume(self, state: State) -> bool:
        """Go to the place of a state; whether the batches on the way there are those of then.

        Raises ValueError where the pass ends before that place.
        """
        first, last = state["checksums"]
        if state["open"] or state["stateful"]:
            jumps = dict(state["jumps"])
            self._rewind(state)
            while self._position < state["taken"]:
                if self._position in jumps:
                    self._set_own(jumps[self._position])
                if not self.take():
                    break
            if state["open"] and self._position < state["taken"]:
                raise ValueError(
                    f"{self.name} ends after {self._position} of the {state['taken']} batches that the run had taken in this "
                    "pass: give the same loaders, or choose another out_dir"
                )
            self._first_checksum = first
            if is_stateful(self.loader) and not state["open"]:
                self._batches, self._end = None, state["end"]
                self.loader.load_state_dict(state["end"])
            return self._position == state["taken"] and checksum(self._last) == last
        equal = []
        for _ in range(2):  # a generator that is not restored may give the same once
            self._rewind(state)
            self.take()
            equal.append(self._first_checksum == first)
        self.close()
        self.recent.clear()
        return all(equal)

    def _rewind(self, state: State) -> None:
        """Begin the pass of a state; at its place, where the loader saves that itself."""
        place = state["place"] or {"own": state["start"]["own"]}
        self._passes = state["passes"] - 1
        set_epoch(self.loader, self._passes)
        GlobalRandomState.from_state(state["start"]["random"]).set()
        self._set_own(place["own"])
        if is_stateful(self.loader) and place["loader"] is not None:
            self.loader.load_state_dict(place["loader"])
        self._generators = generators_of(self.loader)
        self._states = self._own_states()
        self._open(state["start"])
        if is_stateful(self.loader):
            self._places[0] = place
            self._position = place["taken"]
        if place.get("stream"):
            self._stream = GlobalRandomState.from_state(place["stream"])

    def _difference(self, missing: list[str]) -> str:
        """What is to be said where the batches from here on are not those of the run that was interrupted."""
        if missing:
            what = f"has no random generator at {', '.join(missing)} any more; make it where the object is made"
        else:
            what = (
                "gave another batch when it was read again: its data have changed, or its order or transforms depend on "
                "what no checkpoint holds, such as os.urandom, the time or a count of passes; draw from torch's, NumPy's "
                "or Python's global generators, or from a generator that is an attribute of the data set or sampler"
            )
        return f"{self.name} {what}. The run goes on, but does not end as it would have ended without the interruption"

    def refusal(self, state: State) -> str:
        if state["stateful"] != is_stateful(self.loader):
            return f"the place in a {self.name} with{'' if state['stateful'] else 'out'} load_state_dict, unlike this run's"
        theirs, ours = state["own"].keys(), generators_of(self.loader).keys()
        if gone := [path for path in sorted(theirs - ours) if lacks_generator(self.loader, path)]:
            return f"generator= ({self.name}.{gone[0]}), which this run's {self.name} does not have"
        if added := [path for path in sorted(ours - theirs) if path.rpartition(".")[0] in SAMPLERS]:
            return f"no generator= ({self.name}.{added[0]}), which this run's {self.name} has"
        if state["open"]:
            set_epoch(self.loader, state["passes"] - 1)  # on which the number of batches may depend
            if (before := state["length"]) != (length := length_of(self.loader)):
                return f"the place in a {self.name} of {before} batches, this run's has {length} (data set, batch size)"
        return ""

    def restart(self, state: State) -> None:
        self._passes, self._batches = state["passes"], None
        self._set_own(state["own"])
