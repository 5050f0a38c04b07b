"""Where a run is: the random generators, and the place in a pass over a loader."""

from __future__ import annotations

import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """States of the global generators of Python, torch and, where it is in use, NumPy."""
    version, internal, gauss = random.getstate()
    state = {"python": (version, torch.tensor(internal), gauss), "torch": torch.get_rng_state(), "numpy": None}
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, torch.tensor(keys.astype("int64")), *rest)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.cpu().tolist()), gauss))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, generator in enumerate(state["cuda"][:devices]):  # the run may go on with fewer
        torch.cuda.set_rng_state(generator.cpu(), device)
    if state["numpy"] is not None:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.cpu().numpy().astype("uint32"), *rest))


def _sources(loader: Any) -> tuple[Any, ...]:
    return loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators a loader draws its order from, besides the global one."""
    found = [getattr(source, "generator", None) for source in _sources(loader)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class ResumableLoader:
    """Passes over a loader. Its place can be saved and restored: the generators at the start of the pass, batches taken.

    A sampler with set_epoch (torch's DistributedSampler) gets the number of the pass.
    """

    def __init__(self, loader: Any, name: str, remember: int = 0) -> None:
        self.loader, self.name = loader, name
        self.recent: deque[Any] = deque(maxlen=remember)  # the batches of this pass taken last, as the loader gave them
        self._batches: Iterator[Any] | None = None
        self._start: dict[str, Any] = {}
        self._passes = self._taken = 0

    @property
    def remembers(self) -> bool:
        """Whether batches are kept in `recent`."""
        return bool(self.recent.maxlen)

    def recent_or_first(self) -> Iterator[Any]:
        """The batches that it remembers; as many others, before there was one."""
        yield from self.recent or itertools.islice(self.loader, self.recent.maxlen)

    @property
    def open(self) -> bool:
        """Whether a pass has begun and is not over."""
        return self._batches is not None

    def begin(self) -> None:
        self._start = {"random": random_state(), "own": [g.get_state() for g in _generators(self.loader)]}
        for source in _sources(self.loader):
            if hasattr(source, "set_epoch"):
                source.set_epoch(self._passes)
        self._passes += 1
        self._batches, self._taken = iter(self.loader), 0
        self.recent.clear()

    def close(self) -> None:
        """End this pass here."""
        self._batches = None

    def take(self, n: int = 1) -> list[Any]:
        """The next n batches of this pass; fewer, and none, at its end, which closes it."""
        assert self._batches is not None
        batches = list(itertools.islice(self._batches, n))
        self._taken += len(batches)
        self.recent.extend(batches)
        if not batches:
            self._batches = None
        return batches

    def next(self) -> tuple[Any, bool]:
        """The next batch, of a new pass where one is over, and whether it is a first. Raises ValueError where there is none."""
        if not self.open or not (batches := self.take()):
            self.begin()
            batches = self.take()
        if not batches:
            raise ValueError(f"{self.name} is empty: it yielded no batch")
        return batches[0], self._taken == 1

    def state_dict(self) -> dict[str, Any]:
        own = [g.get_state() for g in _generators(self.loader)]
        return {"open": self.open, "passes": self._passes, "taken": self._taken, "start": self._start, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._passes, self._batches = state["passes"], None
        if state["open"]:
            before = random_state()
            set_random_state(state["start"]["random"])
            self._set_own(state["start"]["own"])
            self._passes -= 1
            self.begin()
            for _ in range(state["taken"]):
                self.take()
            set_random_state(before)
        self._set_own(state["own"])

    def follow(self, state: dict[str, Any]) -> None:
        """Go on after the passes of a loader with other batches, of a run on another number of processes."""
        self._passes, self._batches = state["passes"], None
        if len(state["own"]) == len(_generators(self.loader)):
            self._set_own(state["own"])

    def _set_own(self, states: list[torch.Tensor]) -> None:
        for generator, saved in zip(_generators(self.loader), states, strict=True):
            generator.set_state(saved.cpu())
