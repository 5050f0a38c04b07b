"""Saving a run so that it resumes where it was: files written atomically, random generators, loaders in mid-pass."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader


def save_atomically(state: dict[str, Any], path: str | Path) -> None:
    """torch.save to a temporary file in the same folder, then rename: the old file stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def random_state() -> dict[str, Any]:
    """States of Python's and torch's global generators."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": (version, list(internal), gauss), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators a loader draws its order from, besides the global one."""
    sources = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(source, "generator", None) for source in sources]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def loader_state(loader: DataLoader[Any]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loader)]


def set_loader_state(loader: DataLoader[Any], state: list[torch.Tensor]) -> None:
    for generator, saved in zip(_generators(loader), state, strict=True):
        generator.set_state(saved.cpu())


class Cycle:
    """Batches of a loader without end. Its place can be saved and restored: generators at the start, batches taken."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._batches: Iterator[Any] | None = None
        self._start: dict[str, Any] = {}
        self._taken = 0
        self.restarted = False  # with the batch that came last

    def _restart(self) -> None:
        self._start = {"random": random_state(), "loader": loader_state(self.loader)}
        self._batches, self._taken = iter(self.loader), 0

    def next(self) -> Any:
        """The next batch; a new pass over the loader when one is over. Raises ValueError on an empty loader."""
        if self._batches is None:
            self._restart()
        for _ in range(2):
            assert self._batches is not None
            for batch in self._batches:
                self.restarted = not self._taken
                self._taken += 1
                return batch
            self._restart()
        raise ValueError("valid_loader is empty: it yields no batch")

    def state_dict(self) -> dict[str, Any]:
        return {"started": self._batches is not None, "taken": self._taken, **self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = None
        if not state["started"]:
            return
        before = random_state(), loader_state(self.loader)
        set_random_state(state["random"])
        set_loader_state(self.loader, state["loader"])
        self._restart()
        for _ in range(state["taken"]):
            self.next()
        set_random_state(before[0])
        set_loader_state(self.loader, before[1])
