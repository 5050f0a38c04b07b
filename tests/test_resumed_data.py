"""What a run or a loop that goes on knows of its data: batches of the epoch under way, splits, samplers, other data."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import fxstn
from fxstn import hp
from fxstn.bilevel.validation import DrawnStream, SplitStream, validation_stream
from fxstn.loops.remembered import is_plain
from tests.runs import same, without_times
from tests.test_tune import data, loaders, mlp, sgd

STEPS = 12  # of an epoch of the loops below; statistics are of ten batches


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def new_loop(train_loader: Any, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model, its optimizer and its tuner, whose validation data are one batch that is split."""
    x, y = data(60).tensors
    model = normed()
    optimizer = sgd(model)
    specs = [hp.Dropout(), hp.WeightDecay(shared=True)]
    return model, optimizer, fxstn.tune(model, optimizer, F.cross_entropy, train_loader, [(x, y)], specs, **settings)


def gone_on(parts: tuple, *arguments: Any, **settings: Any) -> tuple:
    """New objects in the state of others, by way of what pickle keeps."""
    state = pickle.loads(pickle.dumps([part.state_dict() for part in parts]))
    parts = new_loop(*arguments, **settings)
    for part, own in zip(parts, state, strict=True):
        part.load_state_dict(own)
    return parts


@functools.cache
def end(observed: bool, cut: int | None = None) -> tuple[list, list[Tensor]]:
    """Rows and weights of a loop, which goes on in new objects at a step.

    observed: whether the tuner sees the loader.
    """

    def new() -> tuple[DataLoader, list, dict]:
        loader = DataLoader(data(5 * STEPS), 5)
        return (loader, [loader], {}) if observed else (loader, [None], {"epoch_steps": STEPS})

    loader, arguments, settings = new()
    parts, done = new_loop(*arguments, **settings), 0
    while done < 3 * STEPS:
        for number, (x, y) in enumerate(loader):
            if number < done % STEPS:
                continue  # a loop that goes on passes over what it has trained on
            if done == cut:
                loader, arguments, settings = new()
                parts, cut = gone_on(parts, *arguments, **settings), None
                break
            model, optimizer, tuner = parts
            torch.manual_seed(done)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not observed:
                tuner.step((x, y))
            done += 1
    return without_times(parts[2].history.rows), [weight.detach() for weight in parts[0].parameters()]


@pytest.mark.parametrize("cut", [STEPS + 1, STEPS + 4, 2 * STEPS - 3, 2 * STEPS - 1, 2 * STEPS])
@pytest.mark.parametrize("observed", [False, True])
def test_a_state_within_an_epoch_goes_on_to_the_same_end(cut: int, observed: bool) -> None:
    """Also in the last steps of an epoch, which is evaluated by statistics of batches before the state."""

    (rows, weights), (rows_again, weights_again) = end(observed), end(observed, cut)
    assert len(rows) == 3
    assert same(rows, rows_again)
    assert all(map(torch.equal, weights, weights_again))


def test_a_state_has_batches_only_where_the_epoch_will_not_bring_as_many() -> None:
    loader = DataLoader(data(5 * 30), 5)
    model, optimizer, tuner = new_loop(loader)
    kept = []
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(len(tuner.state_dict()["recent"]["batches"]))
    assert kept == [0] * 20 + list(range(1, 11))
    assert not tuner.state_dict()["recent"]["batches"]  # the epoch is over


def test_batches_that_a_state_cannot_hold_are_told() -> None:
    class Pair(list):
        """A batch of a type of its own."""

    assert is_plain([torch.ones(1), {"a": (1, "b", None)}])
    assert not is_plain((Pair(), torch.ones(1)))
    model, optimizer, tuner = new_loop(None, epoch_steps=4)
    x, y = data(5).tensors
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    tuner.step(Pair((x, y)))
    with pytest.warns(UserWarning, match="no batches of type Pair"):
        state = tuner.state_dict()
    assert state["recent"] == {"batches": []}


@pytest.mark.parametrize("most", [6, 8])
def test_a_loop_that_cuts_its_passes_loses_no_epoch_when_it_goes_on_between_two(most: int) -> None:
    """Also one that has had all eight batches of a pass, keeps it, and never asks for a ninth."""

    def end(cut: int | None) -> list:
        loader = DataLoader(data(40), 5)
        parts = new_loop(loader)
        for epoch in range(4):
            if epoch == cut:
                loader = DataLoader(data(40), 5)
                parts = gone_on(parts, loader)
            model, optimizer, _ = parts
            torch.manual_seed(epoch)
            batches = itertools.islice(iter(loader), most)
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        parts[2].close_epoch()
        return without_times(parts[2].history.rows)

    rows = end(None)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert same(rows, end(2))


def test_an_epoch_without_a_step_is_none() -> None:
    train_loader, valid_loader = loaders()
    model = mlp()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, train_loader, valid_loader, [hp.Dropout()])
    for _ in range(2):
        for x, y in train_loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        tuner.end_epoch()  # after the tuner's own
    assert len(tuner.history) == 2


# The loader of a loop


def test_a_loader_outlives_a_tuner_that_nobody_has() -> None:
    """As a trial that was pruned: an error in the loop leaves no one who could call detach()."""
    train_loader, valid_loader = loaders()

    def trial(fails: bool) -> Any:
        model = mlp()
        tuner = fxstn.tune(model, sgd(model), F.cross_entropy, train_loader, valid_loader, [hp.Dropout()])
        if fails:
            raise KeyError("pruned")
        return tuner

    with pytest.raises(KeyError):
        trial(True)
    own = trial(False)
    gc.collect()
    with pytest.raises(ValueError, match="another tuner works with this train_loader"):
        trial(True)
    own.detach()
    assert type(train_loader) is DataLoader


def test_copies_of_a_loader_are_of_its_own_class_and_nobody_hears_of_them() -> None:
    train_loader, valid_loader = loaders()
    model = mlp()
    tuner = fxstn.tune(model, sgd(model), F.cross_entropy, train_loader, valid_loader, [hp.Dropout()])
    for other in (copy.copy(train_loader), copy.deepcopy(train_loader), pickle.loads(pickle.dumps(train_loader))):
        assert type(other) is DataLoader
        assert not any("listener" in name for name in vars(other))
        assert len(list(other)) == len(train_loader)
    assert type(train_loader) is not DataLoader
    tuner.detach()


# Validation data


class Everything(TensorDataset):
    """Data of one class each: two of the class 0 for eight of the class 1."""

    def __init__(self) -> None:
        target = torch.arange(100) % 10 >= 2
        super().__init__(torch.arange(100.0)[:, None], target.long())


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (None, True),
        (lambda d: RandomSampler(d), True),
        (lambda d: SubsetRandomSampler(range(10, 60)), True),
        (lambda d: RandomSampler(d, num_samples=30), False),
        (lambda d: RandomSampler(d, replacement=True), False),
        (lambda d: WeightedRandomSampler([4.0 if not y else 1.0 for _, y in d], 200), False),
    ],
)
def test_hyper_steps_draw_what_the_loader_draws(sampler: Any, drawn: bool) -> None:
    """Each example once is drawn in batches of another size; what a sampler weighs or chooses is taken as it comes."""
    dataset = Everything()
    loader = DataLoader(dataset, 20, sampler=sampler and sampler(dataset))
    stream = validation_stream(loader, 0, in_order=False)
    stream.resize(10)
    assert isinstance(stream, DrawnStream if drawn else SplitStream)
    shares = torch.cat([stream.next()[0][1] for _ in range(60)]).float()
    expected = 0.5 if "Weighted" in type(loader.sampler).__name__ else 0.8
    assert shares.mean().item() == pytest.approx(expected, abs=0.07)


def test_a_batch_that_was_split_is_gone_on_with() -> None:
    batches = [(torch.arange(10.0 * i, 10.0 * i + 10), torch.zeros(10)) for i in range(3)]
    for taken in range(1, 14):
        stream, again = SplitStream(batches, 0), SplitStream(batches, 0)
        stream.resize(3)
        for _ in range(taken):
            stream.next()
        again.load_state_dict(stream.state_dict())
        for _ in range(9):
            (one, first), (other, first_again) = stream.next(), again.next()
            assert torch.equal(one[0], other[0])
            assert first == first_again


def run(
    folder: Path, valid: int = 20, loss: Any = F.cross_entropy, activation: type[nn.Module] = nn.ReLU, **settings: Any
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), activation(), nn.Dropout(0.3), nn.Linear(8, 3))
    stn = fxstn.transform(model, [hp.Dropout()])
    valid_loader = DataLoader(data(valid), 10)
    files = fxstn.CheckpointSettings(out_dir=folder)
    return fxstn.BilevelRunner(stn, loss, DataLoader(data(40), 10), valid_loader, checkpoints=files, progress=False,
                               **settings)  # fmt: skip


def smooth(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": 30}, "valid_loader has other data"),
        ({"loss": smooth}, r"loss_fn=smooth \(was cross_entropy\)"),
        ({"loss": smooth, "valid_loss_fn": F.cross_entropy}, r"loss_fn=smooth \(was cross_entropy\)"),
        ({"activation": nn.Tanh}, r"model.1=Tanh\(\) \(was ReLU\(\)\)"),
    ],
)
def test_what_a_run_that_goes_on_has_otherwise_is_told(change: dict, message: str, tmp_path: Path) -> None:
    run(tmp_path).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path).fit(2)
    with pytest.warns(fxstn.RunWarning, match=message):
        run(tmp_path, **change).fit(3)


def test_an_evaluation_within_a_run_changes_nothing_that_follows() -> None:
    def history(evaluates: bool) -> list:
        test = DataLoader(data(10), 5, shuffle=True)
        torch.manual_seed(0)
        stn = fxstn.transform(mlp(), [hp.Dropout()])
        train_loader, valid_loader = loaders()
        callbacks = [lambda runner: runner.evaluate(test)] if evaluates else []
        runner = fxstn.BilevelRunner(
            stn, F.cross_entropy, train_loader, valid_loader, progress=False, callbacks=callbacks
        )
        return without_times(runner.fit(3).rows)

    assert same(history(True), history(False))


# What comes out


def test_models_come_back_in_eval_mode() -> None:
    train_loader, valid_loader = loaders()
    runner = fxstn.BilevelRunner(fxstn.transform(mlp(), [hp.Dropout()]), F.cross_entropy, train_loader, valid_loader,
                                 progress=False)  # fmt: skip
    runner.fit(1)
    for model in (runner.best_model(), runner.refit(train_loader)):
        assert not any(module.training for module in model.modules())
    assert runner.stn.model.training


class Buckets:
    """A batch sampler whose batches grow from epoch to epoch, so that there are fewer of them."""

    def __init__(self, n):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return -(-self.n // (8 + 4 * self.epoch))

    def __iter__(self):
        return iter(torch.arange(self.n).split(8 + 4 * self.epoch))


def bucketed(out_dir: Path, ends_at: int | None = None) -> fxstn.BilevelRunner:
    """A run whose batches grow from epoch to epoch; a signal ends it at a call of its loss."""
    torch.manual_seed(0)
    train, calls = data(60), itertools.count(1)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == ends_at:
            signal.raise_signal(signal.SIGTERM)
        return F.cross_entropy(output, target)

    train_loader = DataLoader(train, batch_sampler=Buckets(60))
    checkpoints = fxstn.CheckpointSettings(out_dir=out_dir)
    stn = fxstn.transform(mlp())
    return fxstn.BilevelRunner(stn, loss_fn, train_loader, DataLoader(data(40), 8), checkpoints=checkpoints)


def test_a_run_whose_number_of_batches_depends_on_the_epoch_resumes_within_one(tmp_path: Path) -> None:
    whole = bucketed(tmp_path / "whole").fit(3)
    with pytest.raises(SystemExit):
        bucketed(tmp_path / "cut", ends_at=40).fit(3)  # in the last epoch, of five batches; the first has eight
    resumed = bucketed(tmp_path / "cut").fit(3)
    assert without_times(resumed) == without_times(whole)
