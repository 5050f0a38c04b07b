"""fxstn.tune in loops that read their batches in other ways: ahead, from lists, from the middle of an epoch on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.loops.attached import AttachedTuner
from fxstn.loops.step_module import module_of_step
from tests.runs import same, without_times
from tests.test_tune import QUICK, data, loaders, mlp, sgd, train


def tuned(loader: Any, valid: Any) -> Any:
    """(model, optimizer, tuner)."""
    model = mlp()
    optimizer = sgd(model)
    torch.manual_seed(7)  # of the tuner's noise
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, **QUICK)
    torch.manual_seed(3)
    return model, optimizer, tuner


def test_a_run_that_goes_on_amid_an_epoch_ends_that_epoch_once(tmp_path: Any) -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    train(model, optimizer, loader)
    iterator = iter(loader)
    train(model, optimizer, [next(iterator) for _ in range(1)])
    train(model, optimizer, [next(iterator) for _ in range(1)])
    assert (tuner.steps, len(tuner.history)) == (7, 1)
    torch.save((model.state_dict(), optimizer.state_dict(), tuner.state_dict()), tmp_path / "run.pt")
    assert tuner.detach() is model
    model, optimizer, tuner = tuned(loader, valid)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for part, state in zip((model, optimizer, tuner), saved, strict=True):
        part.load_state_dict(state)
    for number, batch in enumerate(loader):
        if number >= 2:
            train(model, optimizer, [batch])
    assert (tuner.steps, len(tuner.history)) == (10, 2)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_loop_over_a_list_goes_on_within_an_epoch_as_if_it_had_never_stopped(stop: int) -> None:
    """The tuner's own pass beside a list, whose passes cannot be seen, goes on where it was."""
    batches, (_, valid) = list(loaders()[0]), loaders()

    def ended(resumed: bool) -> list[dict[str, float]]:
        model, optimizer, tuner = tuned(batches, valid)
        for number in range(2 * len(batches)):
            if resumed and number == stop:
                states = copy.deepcopy([part.state_dict() for part in (model, optimizer, tuner)])
                tuner.detach()
                model, optimizer, tuner = tuned(batches, valid)
                for part, state in zip((model, optimizer, tuner), states, strict=True):
                    part.load_state_dict(state)
            torch.manual_seed(number)
            train(model, optimizer, [batches[number % len(batches)]])
        tuner.detach()
        return without_times(tuner.history.rows)

    assert same(ended(True), ended(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_epoch_whose_last_step_lies_behind_is_evaluated_in_the_precision_of_the_loop(dtype: torch.dtype) -> None:
    """A resumed loop, which skips all of its batches, ends it before its first forward, which would say so; the scales of
    losses in float16 go on, too."""

    def ended(resumed: bool) -> tuple[list[dict[str, float]], list[float]]:
        loader, valid = loaders()
        model, optimizer, tuner = tuned(loader, valid)
        for epoch in range(2):
            torch.manual_seed(epoch)
            for number, (x, y) in enumerate(loader, 1):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                if resumed and not epoch and number == len(loader):
                    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, tuner)])
            if resumed and not epoch:
                tuner.detach()
                model, optimizer, tuner = tuned(loader, valid)
                for part, state in zip((model, optimizer, tuner), states, strict=True):
                    part.load_state_dict(state)
                torch.manual_seed(epoch)
                assert len(list(loader)) == len(loader)
        tuner.close_epoch()
        return without_times(tuner.history.rows), [scaler.get_scale() for scaler in tuner.updates.scalers.values()]

    (rows, scales), (expected, their_scales) = ended(True), ended(False)
    assert same(rows, expected)
    assert scales == their_scales


def test_a_run_whose_state_is_the_end_of_a_pass_is_evaluated_on_first_batches() -> None:
    """Nothing is remembered after a resume; the tuner's own look at the loader is no pass."""
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    iterator = iter(loader)
    for _ in range(len(loader)):
        train(model, optimizer, [next(iterator)])
    state = copy.deepcopy(tuner.state_dict())
    tuner.detach()
    _, _, other = tuned(loader, valid)
    other.load_state_dict(state)
    other.end_epoch()
    assert len(other.history) == 1


def ahead(loader: Any) -> Iterator[Any]:
    """The batches, each when the next one is already there."""
    iterator = iter(loader)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch
        batch = following


def test_a_loop_that_takes_batches_ahead_has_one_row_for_each_pass() -> None:
    loader, valid = loaders()
    model, optimizer, tuner = tuned(loader, valid)
    for number in range(3):
        train(model, optimizer, ahead(loader))
        assert len(list(loader)) == 5  # an evaluation of the user's own
        assert (tuner.steps, len(tuner.history)) == (5 * number + 5, number + 1)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_steps_of_a_loop_that_takes_batches_ahead_are_of_what_it_trained_on(
    resumed: bool, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its second pass on: the end of the first shows that it reads ahead."""
    steps: list[list[Any]] = []
    advance = AttachedTuner._advance

    def noted(tuner: AttachedTuner, batches: list[Any]) -> None:
        steps.append([x for x, _ in batches])
        advance(tuner, batches)

    monkeypatch.setattr(AttachedTuner, "_advance", noted)
    loader, valid = loaders(train=12 * 6)
    parts = tuned(loader, valid)
    for epoch in range(3):
        if resumed and epoch == 1:
            states = [part.state_dict() for part in parts]
            loader, valid = loaders(train=12 * 6)
            parts = tuned(loader, valid)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        model, optimizer, _ = parts
        steps.clear()
        trained = []
        for number, (x, y) in enumerate(ahead(loader)):
            if number % each == 0:
                optimizer.zero_grad()
            (F.cross_entropy(model(x), y) / each).backward()
            trained.append(x)
            if (number + 1) % each == 0:
                optimizer.step()
        assert len(list(loader)) == 6  # an evaluation of the user's own
        if epoch:
            assert same(steps, [trained[start : start + each] for start in range(0, 6, each)])


def test_a_loop_that_tells_no_beginning_of_a_pass_has_a_row_for_each_end() -> None:
    """As the callbacks of frameworks do, which may hear of the end of an epoch twice."""
    loader, valid = loaders()
    model, optimizer, tuner = tuned(None, valid)
    for number in range(2):
        for batch in loader:
            train(model, optimizer, [batch])
            tuner.step(batch)
        tuner.end_pass()
        tuner.end_pass()
        assert (tuner.steps, len(tuner.history)) == (5 * number + 5, number + 1)


def test_batches_that_a_loop_keeps_for_itself_are_told() -> None:
    loader, valid = loaders()
    model, optimizer, _ = tuned(loader, valid)
    batches = list(loader)
    with pytest.raises(ValueError, match=r"train_loader has yielded no batch"):
        train(model, optimizer, batches, 2)


class Slots:
    """A loader without attributes of its own, or without weak references to it."""

    __slots__: tuple[str, ...] = ("batches",)

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Attributes:
    __slots__ = ("__dict__",)

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class OwnIterator(Attributes):
    """As the loaders of DALI: `iter` returns the object itself, at its start."""

    def __iter__(self) -> Iterator[Any]:
        self.rest = iter(self.batches)
        return self

    def __next__(self) -> Any:
        return next(self.rest)


@pytest.mark.parametrize("kind", [list, tuple, Slots, Attributes, OwnIterator])
def test_each_pass_over_batches_of_ones_own_is_an_epoch(kind: Callable[[list], Any]) -> None:
    loader, valid = loaders()
    loader = kind(list(loader))
    model, optimizer, tuner = tuned(loader, valid)
    train(model, optimizer, loader, 3)
    assert (tuner.steps, len(tuner.history)) == (15, 3)


def test_validation_on_the_training_loader_is_no_pass_of_the_loop() -> None:
    loader = DataLoader(data(60), 12)
    model, optimizer, tuner = tuned(loader, loader)
    train(model, optimizer, loader, 2)
    assert (tuner.steps, len(tuner.history)) == (10, 2)


def test_an_optimizer_that_maximizes_the_negative_loss_tunes_as_one_that_minimizes() -> None:
    values = []
    for sign in (1, -1):
        model, (loader, valid) = mlp(), loaders()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-2, maximize=sign < 0)
        torch.manual_seed(7)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, [hp.Dropout(), hp.WeightDecay()], **QUICK)
        torch.manual_seed(3)
        for x, y in (batch for _ in range(2) for batch in loader):
            optimizer.zero_grad()
            (sign * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
        assert tuner.values() != tuner.history.start
        values.append(list(tuner.values().values()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_step_that_fails_while_its_module_is_sought_leaves_buffers_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = model[1].running_mean.clone()

    def step():
        model(torch.randn(4, 3))
        raise RuntimeError("no such key")

    with pytest.raises(RuntimeError, match="no such key"):
        module_of_step(model, step)
    assert model[1].running_mean.equal(before)
    assert not model._forward_hooks
