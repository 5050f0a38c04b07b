"""Validation batches for hyper steps: of the training batches' size, whatever size the user evaluates with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import parts_of
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.noise import seed_of_step
from fxstn.bilevel.sources import checksum_of_data, generators_of, new_pass, unchanged_generators
from fxstn.bilevel.state import State
from fxstn.bilevel.workers import batches_of
from fxstn.ir.generators import GlobalRandomState

EXAMPLES = 8  # of a batch that shows what a model is called with


class _Batches:
    """Endless batches of [(number of the batch, index), …].

    Each pass has a new order, the same in all processes. Each process takes its share.

    indices: to draw from.
    size: of a batch of one process.
    seed: of the orders.
    start: the number of batches to leave out at the beginning.
    """

    def __init__(self, indices: list[int], size: int, seed: int, start: int) -> None:
        self.indices, self.size, self.seed, self.start = indices, size, seed, start
        self.whole = size * distributed.processes()
        self.length = max(1, len(indices) // self.whole)  # batches of a pass; what is left over waits for another order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while True:
            current, place = divmod(number, self.length)
            generator = torch.Generator().manual_seed((self.seed + current) % 2**63)
            order = torch.randperm(len(self.indices), generator=generator).tolist()
            for first in range(place * self.whole, self.length * self.whole, self.whole):
                batch = order[first : first + self.whole][distributed.rank() :: distributed.processes()]
                yield [(number, self.indices[i]) for i in batch or order[:1]]
                number += 1


class _SeededDataset(Dataset):
    """A data set whose batches, in whatever process, draw from global generators that their numbers seed.

    A batch is asked for as [(its number, index), …].
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: list[tuple[int, Any]]) -> list[Any]:
        seeded_state(self.seed, keys[0][0]).set()
        indices = [index for _, index in keys]
        several = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[index] for index in indices] if several is None else several(indices)


def seeded_state(seed: int, number: int) -> GlobalRandomState:
    """States of the global generators for one batch."""
    return GlobalRandomState.seeded(seed_of_step(seed, number) % 2**32)


class ValidationStream(ABC):
    """Validation batches without end, about as large as those of training. A part with a state in each process.

    seed: of the order of batches and of what the data set draws; the same in all processes.
    size: of a batch. None: that of the loader.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.size: int | None = None
        self._position = 0

    def next(self) -> tuple[object, bool]:
        """The next batch, and whether it is the first of a pass. The global generators stay as they are."""
        before = GlobalRandomState.current()
        try:
            return self.draw()
        finally:
            self._position += 1
            before.set()

    @abstractmethod
    def draw(self) -> tuple[object, bool]:
        """As `next`."""

    def resize(self, size: int) -> None:
        """Use this batch size unless one is in use."""
        if self.size is None:
            self.size = size

    def state_dict(self) -> State:
        return {"position": self._position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: State) -> None:
        self._position, self.size, self.seed = state["position"], state["size"], state["seed"]

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        """Go on from where process 0 of another number of processes was; their batches may have another size."""
        self.load_state_dict(state)
        self.size = None


class DrawnStream(ValidationStream):
    """Draws the examples itself, from the data set of a loader.

    loader: its data set, its choice of examples, its collate_fn and its workers are used; its batch size and order are not.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        super().__init__(seed)
        self.loader, self._length = loader, 1
        self._batches: Iterator[object] | None = None

    @cached_property
    def _data(self) -> str:
        return checksum_of_data(self.loader)

    def draw(self) -> tuple[object, bool]:
        if self._batches is None:
            self._batches = batches_of(self._open())
        return next(self._batches), self._position % self._length == 0

    def _open(self) -> DataLoader:
        loader = self.loader
        size = self.size or loader.batch_size or 1
        sampler = _Batches(indices_of(loader), size, self.seed, self._position)
        self._length = sampler.length
        workers: dict[str, Any] = {}
        if loader.num_workers:
            names = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
            workers = {name: getattr(loader, name) for name in names}
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        dataset = _SeededDataset(loader.dataset, self.seed)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, generator=generator,
                          pin_memory=loader.pin_memory, **workers)  # type: ignore[arg-type]  # fmt: skip

    def state_dict(self) -> State:
        return super().state_dict() | {"data": self._data}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._batches = None
        if state["data"] and self._data and state["data"] != self._data:
            self.__dict__["_data"] = state["data"]  # said once
            warn_caller(
                "valid_loader has other data than when the run was saved, or data that depend on what no checkpoint holds: "
                "losses from here on are not to be compared with those before, and the best epoch may be one of before; "
                "choose another out_dir for a run on other data"
            )


class SplitStream(ValidationStream):
    """Takes the batches of a loader as they come, passes after passes, and splits large ones."""

    def __init__(self, loader: Iterable[object], seed: int) -> None:
        super().__init__(seed)
        self.loader = ResumableLoader(loader, "valid_loader")
        self._parts: list[tuple[object, bool]] = []

    def draw(self) -> tuple[object, bool]:
        seeded_state(self.seed, self._position).set()
        if not self._parts:
            self._parts = self._split(*self.loader.next())
        return self._parts.pop(0)

    def _split(self, batch: object, first: bool) -> list[tuple[object, bool]]:
        parts = [batch] if self.size is None else parts_of(batch, self.size)
        return [(part, first and number == 0) for number, part in enumerate(parts)]

    def state_dict(self) -> State:
        return super().state_dict() | {"loader": self.loader.state_dict(), "left": len(self._parts)}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state, with the rest of a batch that was split."""
        super().load_state_dict(state)
        self.loader.load_state_dict(state["loader"])
        left = state["left"]
        self._parts = self._split(self.loader.last, first=False)[-left:] if left else []


def validation_stream(loader: Iterable[object], seed: int, in_order: bool) -> ValidationStream:
    """What draws validation batches from a loader.

    in_order: whether batches follow each other, as windows of a sequence do.
    """
    inner = data_loader_of(loader)
    if inner is not None and can_be_redrawn(inner) and not in_order and takes_each_once(inner):
        return DrawnStream(inner, seed)
    return SplitStream(loader, seed)


def data_loader_of(loader: Iterable[object]) -> DataLoader | None:
    """The DataLoader that a loader is, or that it wraps and has all attributes of, as a loader of Lightning Fabric has.

    None for another loader, and for a wrapper with other attributes: it may change the batches.
    """
    if isinstance(loader, DataLoader):
        return loader
    own = getattr(loader, "__dict__", {})
    return next(
        (each for each in own.values() if isinstance(each, DataLoader) and vars(each).keys() <= own.keys()), None
    )


def can_be_redrawn(loader: DataLoader) -> bool:
    """Whether a loader's batches can be drawn anew in another size, and again after a resume.

    It is a DataLoader over numbered examples, in batches, whose data set has no random generator of its own.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return False
    inside = any(path.startswith(("dataset", "collate_fn")) for path in generators_of(loader))
    return hasattr(loader.dataset, "__getitem__") and not inside


def indices_of(loader: DataLoader) -> list[int]:
    """The examples that a loader yields, in order, each once; those of all processes where it takes a share of them."""
    return sorted(set(_indices_of_passes(loader, 1)[0]))


def takes_each_once(loader: DataLoader) -> bool:
    """Whether every pass over a loader has the same examples, each once: not with a sampler that weighs or chooses them."""
    first, second = _indices_of_passes(loader, 2)
    return len(set(first)) == len(first) and set(first) == set(second)


def _indices_of_passes(loader: DataLoader, passes: int) -> list[list[int]]:
    """The examples of so many passes, one after the other."""
    if isinstance(loader.sampler, DistributedSampler):
        return [list(range(len(loader.sampler.dataset)))] * passes  # type: ignore[arg-type]
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # accelerate's, of which each process takes a share
        batches = batches.batch_sampler
    with unchanged_generators(loader):
        return [[index for batch in batches for index in batch] for _ in range(passes)]


def example_batch(loader: Iterable[object], most: int | None = EXAMPLES) -> Any:
    """A batch of a few examples, as a loader would yield them. No pass over the loader begins where that can be helped.

    most: examples. None: as many as the loader gives.
    """
    with unchanged_generators(loader):
        inner = data_loader_of(loader)
        if inner is not None and can_be_redrawn(inner):
            assert inner.batch_sampler is not None
            indices = next(iter(inner.batch_sampler))
            return inner.collate_fn([inner.dataset[index] for index in indices[:most]])
        if (batch := next(iter(new_pass(loader)), None)) is None:
            raise ValueError(
                "a loader yields no batch; give one that can be read again and again, such as a DataLoader"
            )
        return batch if most is None else parts_of(batch, most)[0]
