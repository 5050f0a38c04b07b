"""A resumed run goes on with the batches that it would have had: every loader, order and source of noise."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Subset

import fxstn
from fxstn import hp
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.sources import (
    checksum,
    equal_states,
    generator_state,
    generators_of,
    new_pass,
    set_generator_state,
)
from fxstn.ir.generators import GlobalRandomState
from tests.nets import mlp
from tests.runs import dataset, grouped, same, without_times
from tests.scenarios import KINDS, NOISE, ORDERS, ByEpoch, Noisy, OwnNoise, Streamed, loader, numbers, seeded

HERE = Path(__file__).resolve().parent


# Kills


def killed(folder: Path, kills: int, epochs: int, seeds: Iterable[int]) -> list[dict]:
    """What became of the scenarios of these seeds (tests/killed.py)."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    numbers = map(str, (kills, epochs, *seeds))
    done = subprocess.run(
        [sys.executable, str(HERE / "killed.py"), str(folder), *numbers],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "kills", "epochs"),
    [
        ((3, 34), 3, 3),  # with worker processes, too
        pytest.param((1, 2, 4, 18, 12, 15, 30, 44, 49), 3, 3, marks=pytest.mark.nightly),
        pytest.param(range(100, 140), 3, 4, marks=pytest.mark.nightly),
        pytest.param(range(200, 203), 25, 30, marks=pytest.mark.nightly),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been_or_says_that_it_does_not(
    tmp_path, seeds, kills, epochs
):
    results = killed(tmp_path, kills, epochs, seeds)
    assert [result["seed"] for result in results] == list(seeds)
    wrong = [result for result in results if not result["right"]]
    assert not wrong, "\n".join(map(str, wrong))
    assert min(result["kills"] for result in results) >= kills - 1  # a short run may be over before its last kill


# Loaders


def saved(state: dict) -> dict:
    """A state as a file gives it back."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def drawn(stream: ResumableLoader, count: int) -> list:
    """Batches of a run that draws from all generators between them, and evaluates on the same loader now and then."""
    batches = []
    for number in range(count):
        batches += stream.next()
        torch.rand(3)
        numpy.random.rand(2)
        random.random()
        if number % 5 == 2:
            batches += list(new_pass(stream.loader))
    return batches


def resumed(make_loader, count: int, after: int, remember: int = 0) -> tuple[list, list]:
    """The batches that a run takes after so many, and those that it takes in a new process from a state saved there."""
    seed_all(5)
    stream = ResumableLoader(make_loader(), "loader", remember)
    drawn(stream, count)
    state, place = saved(stream.state_dict()), GlobalRandomState.current()
    expected = [*drawn(stream, after), *stream.recent]
    seed_all(77)
    other = ResumableLoader(make_loader(), "loader", remember)
    assert other.refusal(state) == ""
    other.load_state_dict(state)
    place.set()
    return expected, [*drawn(other, after), *other.recent]


CASES = [("map", order, noise) for order in ORDERS for noise in ("none", "torch", "own numpy")]
CASES += [(kind, "generator", noise) for kind in dict.fromkeys(KINDS) for noise in NOISE if noise != "system"]


@pytest.mark.parametrize(("kind", "order", "noise"), dict.fromkeys(CASES))
def test_a_loader_goes_on_in_a_new_process_as_it_would_have(kind, order, noise):
    for count in (1, 3, 6, 8):
        expected, batches = resumed(lambda: loader(kind, order, "main", noise, 24, 0), count, 7, count % 2 * 3)
        assert same(batches, expected), count


@pytest.mark.parametrize("workers", ["1", "kept"])
def test_a_loader_with_workers_goes_on_in_a_new_process_as_it_would_have(workers):
    for count in (2, 5):
        assert same(*resumed(lambda: loader("map", "shuffle", workers, "torch", 24, 0), count, 3))


def test_two_loaders_that_share_a_generator_and_a_data_set_go_on_as_they_would_have():
    def pair(state=None):
        generator, data = seeded(3), Noisy(numbers(24, 0), OwnNoise(numpy.random.default_rng(2)))
        parts = [Subset(data, range(0, 24, 2)), Subset(data, range(1, 24, 2))]
        samplers = [RandomSampler(part, True, 50, generator) for part in parts]
        return [ResumableLoader(DataLoader(p, 3, sampler=s), "loader") for p, s in zip(parts, samplers, strict=True)]

    def alternate(streams, count):
        return [batch for i in range(count) for batch in streams[i % 3 == 2].next()]

    first = pair()
    alternate(first, 23)
    states = [saved(stream.state_dict()) for stream in first]
    place, expected = GlobalRandomState.current(), alternate(first, 40)
    second = pair()
    for stream, state in zip(second, states, strict=True):
        stream.load_state_dict(state)
    place.set()
    assert same(alternate(second, 40), expected)


def test_a_generator_that_was_never_seeded_goes_on_in_another_process():
    assert same(*resumed(lambda: DataLoader(Noisy(numbers(24, 0), OwnNoise(numpy.random.default_rng())), 4), 4, 9))


def test_a_loader_without_random_transforms_draws_what_a_loop_over_it_draws():
    for order in ("shuffle", "weighted", "with replacement"):
        seed_all(1)
        whole = loader("map", order, "main", "none", 24, 0)
        plain = [batch for _ in range(2) for batch in whole]
        place = torch.get_rng_state()
        seed_all(1)
        stream = ResumableLoader(loader("map", order, "main", "none", 24, 0), "loader")
        assert same([stream.next()[0] for _ in plain], plain)
        assert torch.equal(torch.get_rng_state(), place)


def test_no_two_loaders_passes_and_training_draw_the_same_numbers():
    still = Noisy(torch.zeros(24, 6), NOISE["torch"]())
    seed_all(1)
    values = [torch.randn(50)]
    for name in ("train_loader", "valid_loader"):
        place = torch.get_rng_state()
        stream = ResumableLoader(DataLoader(still, 4), name)
        for _ in range(3):
            stream.begin()
            batches = stream.take(9)
            values += [
                batch[0][:, 0] / 0.3 for batch in batches[name == "valid_loader" :]
            ]  # the first draws as training does
        torch.set_rng_state(place)
    values = torch.cat(values)
    assert len(values.unique()) == len(values)


# Epochs


def test_set_epoch_of_all_parts_gets_0_1_2_once_in_a_pass_and_goes_on_after_a_resume():
    calls: list[tuple[str, int]] = []

    class Told:
        name = ""

        def set_epoch(self, epoch: int) -> None:
            calls.append((self.name, epoch))

    def named(name: str, base: type, *args: object) -> object:
        return type(name, (Told, base), {"name": name})(*args)

    def build() -> DataLoader:
        rows = named("rows", Noisy, numbers(8, 0), NOISE["none"]())
        data = named("data", ConcatDataset, [rows])
        return DataLoader(data, batch_sampler=named("batches", BatchSampler, named("order", ByEpoch, 8), 4, False))

    stream = ResumableLoader(build(), "loader")
    for epoch in range(3):
        stream.begin()
        assert sorted(calls) == [(name, epoch) for name in ("batches", "data", "order", "rows")]
        calls.clear()
        while stream.take():
            pass
    other = ResumableLoader(build(), "loader")
    other.load_state_dict(saved(stream.state_dict()))
    assert {epoch for _, epoch in calls} == {2}
    calls.clear()
    other.begin()
    assert {epoch for _, epoch in calls} == {3}


def test_an_iterable_data_set_has_another_order_in_each_epoch():
    stream = ResumableLoader(DataLoader(Streamed(Noisy(numbers(24, 0), NOISE["none"]()), 24), 4), "loader")
    passes = []
    for _ in range(3):
        stream.begin()
        passes.append(checksum(stream.take(9)))
    assert len(set(passes)) == 3


# What cannot be followed


class Counting:
    """Each pass has an order of its own, by a count of passes that no checkpoint has."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[object]:
        self.passes += 1
        yield from torch.randperm(24, generator=seeded(self.passes)).split(4)


class Hidden(Dataset):
    """Draws from a generator that is in no attribute."""

    def __init__(self) -> None:
        self.numbers = iter(random.Random(1).random, None)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> float:
        return next(self.numbers)


def read(build, count: int) -> ResumableLoader:
    """A stream of which so many batches were read; at the end of a pass, that is over."""
    seed_all(1)
    stream = ResumableLoader(build(), "train_loader")
    for _ in range(count):
        stream.next()
    if count % 6 == 0:
        stream.take()
        stream.close()
    return stream


@pytest.mark.parametrize(
    ("build", "count"),
    [
        *((Counting, count) for count in (6, 12, 13)),
        *((lambda: DataLoader(Hidden(), 4), count) for count in (6, 12, 13)),
        *((lambda: loader("map", "shuffle", "main", "system", 24, 0), count) for count in (5, 6, 13)),
        *((lambda: loader("stateful", "still", "main", "system", 24, 0), count) for count in (2, 3)),
    ],
)
def test_what_cannot_be_followed_is_said_with_the_name_of_the_loader_and_a_remedy(build, count):
    state, other = saved(read(build, count).state_dict()), ResumableLoader(build(), "train_loader")
    text = "train_loader gave another batch when it was read again.*draw from.*does not end as it would have ended"
    with pytest.warns(fxstn.RunWarning, match=text):
        other.load_state_dict(state)


@pytest.mark.parametrize("build", [Counting, lambda: DataLoader(Hidden(), 4)])
def test_within_the_first_pass_reading_it_again_is_enough(build):
    stream, other = read(build, 4), ResumableLoader(build(), "train_loader")
    other.load_state_dict(saved(stream.state_dict()))
    assert same([other.next() for _ in range(4)], [stream.next() for _ in range(4)])


def test_a_generator_that_is_no_longer_there_is_said():
    noise = OwnNoise(random.Random(1))
    stream = ResumableLoader(DataLoader(Noisy(numbers(8, 0), noise), 4), "train_loader")
    stream.next()
    state = stream.state_dict()
    noise.generator = None
    with pytest.warns(
        fxstn.RunWarning, match=r"no random generator at dataset\.noise\.generator any more; make it where"
    ):
        ResumableLoader(DataLoader(Noisy(numbers(8, 0), lambda: 0.0), 4), "train_loader").load_state_dict(state)


def test_generators_are_found_in_all_parts_of_a_loader_and_global_ones_are_not():
    rows = Noisy(numbers(8, 0), NOISE["closure"]())
    crop = [OwnNoise(random.Random(1))]
    rows.transforms = {"crop": crop, "global": numpy.random.mtrand._rand, "torch": torch.default_generator,
                       "bits": numpy.random.mtrand._rand._bit_generator, "own bits": numpy.random.PCG64(3)}  # fmt: skip
    data = ConcatDataset([Subset(rows, range(8))])
    batches = BatchSampler(RandomSampler(data, generator=seeded(1)), 4, False)
    generators = generators_of(DataLoader(data, batch_sampler=batches, collate_fn=OwnNoise(numpy.random.default_rng())))
    assert set(generators) == {
        "batch_sampler.sampler.generator", "collate_fn.generator", "dataset.datasets[0].dataset.noise.generator",
        "dataset.datasets[0].dataset.transforms['crop'][0].generator",
        "dataset.datasets[0].dataset.transforms['own bits']",
    }  # fmt: skip


MODULE_GENERATOR = numpy.random.default_rng(3)


def test_a_generator_of_the_module_of_a_data_set_is_found():
    class Rows(Noisy):
        def __getitem__(self, i: int):
            return self.x[i] + MODULE_GENERATOR.normal()

    assert list(generators_of(DataLoader(Rows(numbers(8, 0), NOISE["none"]())))) == [
        "dataset.__getitem__.MODULE_GENERATOR"
    ]


KINDS_OF_BITS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
OTHER_KINDS = ("RandomState", "Random", "torch")


@pytest.mark.parametrize("kind", [*KINDS_OF_BITS, *(f"{kind} alone" for kind in KINDS_OF_BITS), *OTHER_KINDS])
def test_the_state_of_every_kind_of_generator_comes_back_from_a_file(kind):
    if kind in KINDS_OF_BITS:
        generator = numpy.random.Generator(getattr(numpy.random, kind)(3))
    elif kind not in OTHER_KINDS:
        generator = getattr(numpy.random, kind.removesuffix(" alone"))(3)
    else:
        generator = {"RandomState": numpy.random.RandomState(3), "Random": random.Random(3), "torch": seeded(3)}[kind]

    def draw() -> float:
        if kind == "torch":
            return torch.randn((), generator=generator).item()
        if kind.endswith(" alone"):
            return int(generator.random_raw())
        return generator.gauss(0, 1) if kind == "Random" else generator.normal()

    draw()
    state = saved({"state": generator_state(generator)})["state"]
    assert equal_states(state, generator_state(generator))
    expected = [draw() for _ in range(3)]
    assert not equal_states(state, generator_state(generator))
    set_generator_state(generator, state)
    assert [draw() for _ in range(3)] == expected


def test_a_checksum_takes_every_kind_of_batch_and_differs_where_a_number_does():
    x = torch.randn(4, 3)
    leaves = [x, x.T, x.bfloat16(), x > 0, x.to(torch.complex64).conj(), x[:0], x[0, 0], 2 * x.numpy(), "a", 3, 0.5]
    leaves += [torch.nn.utils.rnn.pack_sequence([x])]
    assert len({checksum([leaf, 1]) for leaf in leaves}) == len(leaves)
    assert checksum({"a": (x, "b"), "c": [x.to_sparse(), None, object()]})
    assert checksum(x) == checksum(x.clone()) != checksum(x + 1e-6)


# Refusals


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            {"generator": seeded(1)},
            {},
            "generator= (train_loader.generator), which this run's train_loader does not have",
        ),
        ({}, {"generator": seeded(1)}, "no generator= (train_loader.generator), which this run's train_loader has"),
        ({}, {"batch_size": 4}, "the place in a train_loader of 5 batches, this run's has 10 (data set, batch size)"),
    ],
)
def test_another_loader_is_refused_in_the_middle_of_a_pass(there, here, message):
    streams = [
        ResumableLoader(DataLoader(dataset(40, 0), **({"batch_size": 8, "shuffle": True} | options)), "train_loader")
        for options in (there, here)
    ]
    streams[0].begin()
    streams[0].take(2)
    assert streams[1].refusal(streams[0].state_dict()) == message


class Counted(IterableDataset):
    """So many examples, in a data set that does not know how many."""

    def __init__(self, count: int) -> None:
        self.examples = list(dataset(count, 0))

    def __iter__(self) -> Iterator:
        return iter(self.examples)


class Unsized:
    """A loader without a length."""

    def __init__(self, count: int) -> None:
        self.batches = DataLoader(dataset(count, 0), 1)

    def __iter__(self) -> Iterator:
        return iter(self.batches)


@pytest.mark.parametrize("build", [lambda n: DataLoader(Counted(n), 1), Unsized], ids=["iterable", "unsized"])
@pytest.mark.parametrize("shorter", ["train_loader", "valid_loader"])
def test_a_loader_that_ends_before_the_place_of_a_run_is_refused_and_nothing_changes(tmp_path, build, shorter):
    def run(train: int, valid: int, stop: int = 0):
        torch.manual_seed(0)
        calls = []

        def loss_fn(output, target):
            calls.append(0)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return F.cross_entropy(output, target)

        stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
        settings = grouped(
            {},
            checkpoints={"out_dir": tmp_path},
            hyper={"train_steps": 1},
            progress=False,
            valid_loss_fn=F.cross_entropy,
        )
        return fxstn.BilevelRunner(stn, loss_fn, build(train), build(valid), **settings)

    with pytest.raises(SystemExit):
        run(20, 20, 18).fit(2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = run(*((3, 20) if shorter == "train_loader" else (20, 3)))
    before = other.stn.state_dict()
    before = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(
        ValueError,
        match=rf"last\.pt cannot be .* as it was .*{shorter} ends after 3 of the \d+ batches .* the same loaders",
    ):
        other.fit(2)
    assert same(before, {name: other.stn.state_dict()[name] for name in before})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert len(run(20, 20).fit(2)) == 2


# Evaluations that fail


def run_with_a_fault(kind: str, recalibrate: int, place: str = "", error: type[BaseException] = Exception):
    """A run; `error` is raised once, at a place in the evaluation at the end of its second epoch."""
    calls: list[str] = []

    def happens(where: str) -> None:
        calls.append(where)
        if where == place and calls.count(where) == 5:  # 3 batches in an evaluation
            raise error(where)

    def metric(output, target):
        happens("metric")
        return output.mean()

    seed_all(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    runner = fxstn.BilevelRunner(
        fxstn.transform(net, [hp.Dropout(), hp.WeightDecay(shared=True)]),
        F.cross_entropy,
        loader(kind, "shuffle", "main", "torch", 40, 0),
        loader("map", "shuffle", "main", "torch", 24, 1),
        metrics={"metric": metric},
        hyper=fxstn.HyperSettings(train_steps=2, recalibrate=recalibrate),
        progress=False,
    )
    training_loss = runner._tuner.evaluator.clean_train_loss

    def clean_train_loss(count):
        for _ in range(3):
            happens("clean training loss")
        return training_loss(count)

    runner._tuner.evaluator.clean_train_loss = clean_train_loss
    return runner


@pytest.mark.parametrize("kind", ["map", "stateful"])
@pytest.mark.parametrize(
    ("recalibrate", "place", "error"),
    [(2, "metric", RuntimeError), (2, "clean training loss", KeyboardInterrupt), (0, "metric", KeyboardInterrupt)],
)
def test_a_run_goes_on_after_an_evaluation_that_failed_as_if_it_had_not(tmp_path, kind, recalibrate, place, error):
    whole = run_with_a_fault(kind, recalibrate)
    rows = without_times(whole.fit(4))
    runner = run_with_a_fault(kind, recalibrate, place, error)
    with pytest.raises(error, match=place):
        runner.fit(4)
    assert without_times(runner.history) == rows[:1]
    runner.save(tmp_path / "run.pt")
    assert without_times(runner.fit(4)) == rows
    resumed = run_with_a_fault(kind, recalibrate)
    resumed.load(tmp_path / "run.pt")
    assert without_times(resumed.fit(4)) == rows
    for other in (runner, resumed):
        assert same(dict(other.stn.state_dict()), dict(whole.stn.state_dict()))
