"""Runs that differ in what a resume must restore: a seed gives one (loaders, samplers, workers, noise, precision, …)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import fxstn
from fxstn import hp
from tests.nets import mlp

Pair = tuple[Tensor, Tensor]


def numbers(n: int, seed: int) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


# Noise


class OwnNoise:
    """Draws from a generator that is an attribute."""

    def __init__(self, generator: torch.Generator | numpy.random.Generator | random.Random) -> None:
        self.generator = generator

    def __call__(self) -> float:
        if isinstance(self.generator, torch.Generator):
            return torch.randn((), generator=self.generator).item()
        return (
            self.generator.normal() if isinstance(self.generator, numpy.random.Generator) else self.generator.random()
        )


def closure() -> Callable[[], float]:
    generator = numpy.random.RandomState(4)
    return lambda: generator.randn()


NOISE: dict[str, Callable[[], Callable[[], float]]] = {
    "none": lambda: lambda: 0.0,
    "torch": lambda: lambda: torch.randn(()).item(),
    "numpy": lambda: lambda: numpy.random.randn(),
    "python": lambda: lambda: random.gauss(0, 1),
    "own torch": lambda: OwnNoise(torch.Generator().manual_seed(4)),
    "own numpy": lambda: OwnNoise(numpy.random.default_rng(4)),
    "own python": lambda: OwnNoise(random.Random(4)),
    "closure": closure,
    "system": lambda: lambda: os.urandom(1)[0] / 256,
}


class Noisy(Dataset):
    """Vectors with noise, and the classes of the vectors without it."""

    def __init__(self, x: Tensor, noise: Callable[[], float]) -> None:
        self.x, self.noise = x, noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Pair:
        return self.x[i] + 0.3 * self.noise(), self.x[i, :3].argmax()


class Streamed(IterableDataset):
    """The same in an order of its own for each epoch; each worker has its share."""

    def __init__(self, data: Dataset, n: int) -> None:
        self.data, self.n, self.epoch = data, n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Pair]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        info = get_worker_info()
        yield from (self.data[i] for i in order[info.id if info else 0 :: info.num_workers if info else 1])


# Orders


class ByEpoch(Sampler[int]):
    """Another order for each epoch, which set_epoch sets."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return self.n


class OneByOne(ByEpoch):
    """Draws each index from a generator when it is due; from the global one where it has none."""

    def __init__(self, n: int, generator: random.Random | None) -> None:
        super().__init__(n)
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        yield from ((self.generator or random).randrange(self.n) for _ in range(self.n))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ORDERS: dict[str, Callable[[Dataset, int, int], dict]] = {
    "still": lambda data, n, size: {"batch_size": size},
    "shuffle": lambda data, n, size: {"batch_size": size, "shuffle": True},
    "generator": lambda data, n, size: {"batch_size": size, "shuffle": True, "generator": seeded(1)},
    "weighted": lambda data, n, size: {"batch_size": size, "sampler": WeightedRandomSampler([1.0, 2.0] * (n // 2), n)},
    "weighted, own": lambda data, n, size: {
        "batch_size": size, "sampler": WeightedRandomSampler([1.0, 2.0] * (n // 2), n, generator=seeded(1))
    },
    "subset": lambda data, n, size: {"batch_size": size, "sampler": SubsetRandomSampler(range(n), seeded(1))},
    "with replacement": lambda data, n, size: {
        "batch_size": size, "sampler": RandomSampler(data, replacement=True, generator=seeded(1))
    },
    "batches": lambda data, n, size: {"batch_sampler": BatchSampler(RandomSampler(data, generator=seeded(1)), size, False)},
    "by epoch": lambda data, n, size: {"batch_sampler": BatchSampler(ByEpoch(n), size, False)},
    "one by one": lambda data, n, size: {"batch_size": size, "sampler": OneByOne(n, None)},
    "one by one, own": lambda data, n, size: {"batch_size": size, "sampler": OneByOne(n, random.Random(1))},
}  # fmt: skip


# Loaders


class Custom:
    """An iterable that draws its batches at random when they are due."""

    def __init__(self, data: Noisy, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in range(len(self.data) // self.size):
            pairs = [self.data[i] for i in torch.randint(len(self.data), (self.size,)).tolist()]
            yield [torch.stack(column) for column in zip(*pairs, strict=True)]


class StatefulLookalike:
    """Saves and restores its place as torchdata's StatefulDataLoader does; begun again, it could not be replayed.

    Asked between two passes, it opens the next one to say where it is: that draws its seed from torch's generator.
    """

    def __init__(self, data: Dataset, n: int, size: int) -> None:
        self.data, self.n, self.size, self.seed, self.taken = data, n, size, 0, 0
        self._restored, self._open, self._next = False, False, None

    def _seed_of_next(self) -> int:
        if self._next is None:
            self._next = int(torch.empty((), dtype=torch.int64).random_())
        return self._next

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self._restored:
            self.seed, self.taken, self._next = self._seed_of_next(), 0, None
        self._restored, self._open = False, True
        order = torch.randperm(self.n, generator=seeded(self.seed)).split(self.size)
        while self.taken < len(order):
            self.taken += 1
            pairs = [self.data[i] for i in order[self.taken - 1].tolist()]
            yield [torch.stack(column) for column in zip(*pairs, strict=True)]
        self._open = False

    def state_dict(self) -> dict:
        following = None if self._open or self._restored else self._seed_of_next()
        return {"seed": self.seed, "taken": self.taken, "next": following}

    def load_state_dict(self, state: dict) -> None:
        self.seed, self.taken, self._next = state["seed"], state["taken"], state["next"]
        self._restored = self._next is None


WORKERS = {
    "main": {},
    "1": {"num_workers": 1},
    "2": {"num_workers": 2},
    "kept": {"num_workers": 2, "persistent_workers": True},
}
KINDS = ("map", "map", "map", "concatenated", "iterable", "list", "custom", "stateful")


def loader(kind: str, order: str, workers: str, noise: str, n: int, seed: int) -> object:
    """A loader of n examples in batches of 8."""
    data, size = Noisy(numbers(n, seed), NOISE[noise]()), 8
    processes = WORKERS[workers] | ({"multiprocessing_context": "fork"} if workers != "main" else {})
    if kind == "list":
        return [(data.x[i : i + size], data.x[i : i + size, :3].argmax(1)) for i in range(0, n, size)]
    if kind == "custom":
        return Custom(data, size)
    if kind == "stateful":
        return StatefulLookalike(data, n, size)
    if kind == "iterable":
        return DataLoader(Streamed(data, n), size, **processes)
    whole = (
        ConcatDataset([Subset(data, range(n // 2)), Subset(data, range(n // 2, n))]) if kind == "concatenated" else data
    )
    return DataLoader(whole, **ORDERS[order](whole, n, size), **processes)


# Schedulers

schedules = torch.optim.lr_scheduler
SCHEDULERS: dict[str, dict] = {
    "none": {},
    "steps of epochs": {"schedulers": {"optimizer": lambda o: schedules.StepLR(o, 2, 0.5)}},
    "plateau": {"schedulers": {"optimizer": lambda o: schedules.ReduceLROnPlateau(o, patience=0)}},
    "warm-up": {"step_schedulers": {"response.optimizer": lambda o: schedules.LinearLR(o, total_iters=12)}},
    "one cycle": {"step_schedulers": {"optimizer": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=100)}},
    "sequence": {
        "step_schedulers": {
            "optimizer": lambda o: schedules.SequentialLR(
                o, [schedules.ConstantLR(o, 0.1, 4), schedules.CosineAnnealingLR(o, 20)], [5]
            )
        }
    },
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Scenario:
    """A run, in words."""

    train: tuple[str, str, str, str]  # kind, order, workers, noise
    valid: tuple[str, str, str, str]
    precision: str
    scheduler: str
    settings: tuple[tuple[str, object], ...]
    minutes: float  # between two files

    @classmethod
    def of(cls, seed: int) -> Scenario:
        chance = random.Random(seed)

        def draw() -> tuple[str, str, str, str]:
            kind = chance.choice(KINDS)
            place = chance.choice(tuple(WORKERS)) if kind in ("map", "concatenated", "iterable") else "main"
            return kind, chance.choice(tuple(ORDERS)), place, chance.choice(tuple(NOISE))

        accumulate, train_steps = chance.choice((1, 1, 2)), chance.choice((1, 2, 3))
        ema, tune_scale, every = chance.choice((None, 0.9)), chance.random() < 0.5, chance.choice((1, 4))
        settings = {
            "accumulate": accumulate,
            "ema": ema,
            "hyper": fxstn.HyperSettings(train_steps=train_steps, tune_scale=tune_scale),
            "response": fxstn.ResponseSettings(every=every),
        }
        return cls(
            draw(), draw(), chance.choice(tuple(PRECISIONS)), chance.choice(tuple(SCHEDULERS)), tuple(settings.items()),
            chance.choice((1e-9, 3e-4)),
        )  # fmt: skip

    @property
    def unfollowed(self) -> list[str]:
        """The loaders whose batches depend on what no checkpoint can hold."""
        loaders = {"train": self.train, "valid": self.valid}
        return [name for name, (kind, *_, noise) in loaders.items() if noise == "system" and kind != "list"]

    def runner(self, out: Path | None, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> fxstn.BilevelRunner:
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        model: nn.Module = mlp()
        stn = fxstn.transform(model, [hp.Dropout("2", "5", init=0.3), hp.WeightDecay(shared=True)])
        return fxstn.BilevelRunner(
            stn,
            loss_fn,
            loader(*self.train, n=32, seed=0),
            loader(*self.valid, n=24, seed=1),  # type: ignore[arg-type]
            valid_loss_fn=F.cross_entropy,
            checkpoints=fxstn.CheckpointSettings(out_dir=out, save_minutes=self.minutes),
            execution=fxstn.ExecutionSettings(autocast=PRECISIONS[self.precision]),
            progress=False,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            **dict(self.settings),
            **SCHEDULERS[self.scheduler],
        )

    def __str__(self) -> str:
        return str(asdict(self))
