"""Loops of frameworks that wrap the model, the loaders and the optimizer: here in the shape of Lightning Fabric and fastai."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.bilevel.validation import DrawnStream, SplitStream, validation_stream
from tests.runs import same, without_times
from tests.test_tune import QUICK, loaders, mlp, sgd


class Wrapper(nn.Module):
    """Runs a model in a precision of its own, and has it as a property, under another name in its state."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._forward_module, self.dtype = model, dtype

    @property
    def module(self) -> nn.Module:
        return self._forward_module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.module(x)


class WrappedLoader:
    """Has all attributes of a loader, and yields its batches."""

    def __init__(self, loader: DataLoader) -> None:
        self.__dict__.update(loader.__dict__)
        self._dataloader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self._dataloader


class ChangedLoader:
    """Yields other batches than the loader that it has."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return ((x / 2, y) for x, y in self.loader)


class WrappedOptimizer:
    """Another object, which steps the optimizer that it has."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.opt = optimizer


def train(wrap: bool, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any, list]:
    model, (loader, valid) = mlp(0.3), loaders(valid_size=5)
    optimizer, whole = sgd(model), Wrapper(model, dtype)
    wrapped: Any = (whole, WrappedOptimizer(optimizer), WrappedLoader(loader), WrappedLoader(valid))
    given, opt, seen, held_out = wrapped if wrap else (model, optimizer, loader, valid)
    specs = [hp.Dropout(), hp.WeightDecay(shared=True)]
    tuner = fxstn.tune(given, opt, F.cross_entropy, seen, held_out, specs, **QUICK)
    torch.manual_seed(0)
    for _ in range(2):
        for x, y in seen:
            optimizer.zero_grad()
            F.cross_entropy(whole(x).float(), y).backward()
            optimizer.step()
    return model, tuner, without_times(tuner.history.rows)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_a_framework_has_wrapped_is_tuned_as_what_is_in_it(dtype: torch.dtype | None) -> None:
    (model, tuner, rows), (other, within, rows_again) = train(False, dtype), train(True, dtype)
    assert len(rows) == 2
    assert same(rows, rows_again)
    assert same(model.state_dict(), other.state_dict())
    assert within.values().keys() == tuner.values().keys()
    within.load_state_dict(tuner.state_dict())


def test_a_loader_that_may_change_its_batches_is_read_itself() -> None:
    _, valid = loaders()
    kinds = [type(validation_stream(each, 0, False)) for each in (WrappedLoader(valid), ChangedLoader(valid))]
    assert kinds == [DrawnStream, SplitStream]


def test_a_loader_that_has_taken_over_the_attributes_of_an_observed_one_is_not_observed() -> None:
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer = sgd(model)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, [hp.Dropout()], **QUICK)
    wrapped = WrappedLoader(loader)
    tuner.detach()
    again = fxstn.tune(model, optimizer, F.cross_entropy, wrapped, valid, [hp.Dropout()], **QUICK)
    for x, y in wrapped:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    again.detach()
    assert len(again.history) == 1
    assert type(wrapped) is WrappedLoader


@pytest.mark.parametrize("told", [False, True])
def test_a_step_that_sets_up_the_state_of_an_optimizer_is_none_of_the_loop(told: bool) -> None:
    """torch.distributed.checkpoint takes one of a fresh optimizer, at rate 0 and with gradients of zero."""
    rows = []
    for before in (True, False):
        model, (loader, valid) = mlp(0.3), loaders()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if before:
            get_state_dict(model, optimizer)
        seen, settings = (None, {"epoch_steps": 5}) if told else (loader, {})
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, seen, valid, [hp.Dropout()], **QUICK, **settings)
        if not before:
            get_state_dict(model, optimizer)
        torch.manual_seed(0)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if told:
                tuner.step((x, y))
        rows.append(without_times(tuner.history.rows))
    assert len(rows[0]) == 1
    assert same(*rows)
