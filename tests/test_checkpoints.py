"""What a checkpoint holds, and what a run makes of one that was saved with other settings."""

from __future__ import annotations

import enum
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import make, without_times
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

import fxstn
from fxstn.bilevel.plain import check_readable, plain_numbers

# What a file holds


class Third(enum.IntEnum):
    three = 3


NUMPY = {
    "lr and betas": {
        "optimizer": lambda p: SGD(p, lr=np.logspace(-3, -1, 3)[1]),
        "response_optimizer": partial(torch.optim.Adam, betas=(np.float64(0.8), np.float64(0.99))),
        "schedulers": {"optimizer": lambda o: schedules.StepLR(o, np.int64(2), gamma=np.float32(0.3))},
    },
    "momentum": {
        "optimizer": partial(SGD, lr=0.1, momentum=np.float32(0.3), dampening=np.float64(0.1)),
        "schedulers": {"optimizer": lambda o: schedules.CosineAnnealingLR(o, Third.three, np.float32(1e-3))},
    },
    "fraction": {
        "optimizer": partial(SGD, lr=Fraction(1, 3)),
        "schedulers": {"optimizer": lambda o: schedules.MultiStepLR(o, np.arange(2, 9, 2), gamma=0.3)},
    },
    "step schedulers": {"step_schedulers": {
        "response_optimizer": lambda o: schedules.LambdaLR(o, lambda n: np.float64(0.9) ** n),
        "optimizer": lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, np.float32(0.1)), schedules.ExponentialLR(o, np.float64(0.9))], [np.int64(4)]),
    }},
}  # fmt: skip


@pytest.mark.parametrize("settings", NUMPY.values(), ids=NUMPY)
def test_a_run_with_numbers_of_numpy_resumes_as_if_it_had_not_stopped(tmp_path, settings):
    whole = make(**settings).fit(3)
    make(tmp_path, **settings).fit(1)
    assert without_times(make(tmp_path, **settings).fit(3)) == without_times(whole)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] >= 1


def test_a_run_with_numbers_of_numpy_goes_back_to_its_file(tmp_path):
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == 13 else 1.0)

    runner = make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy, **NUMPY["lr and betas"])
    with pytest.warns(fxstn.RunWarning, match=r"back to epoch 2 .*optimizer 0\.0015 "):
        assert len(runner.fit(4)) == 4


def test_plain_numbers_keep_values_and_structures():
    value = {np.str_("a"): [np.float32(0.1), (np.int64(2), np.bool_(True))], 3: {np.int64(1)}, "t": torch.ones(2)}
    result = plain_numbers(value)
    assert result == {"a": [float(np.float32(0.1)), (2, True)], 3: {1}, "t": value["t"]}
    assert [type(key) for key in result] == [str, int, str]
    assert type(result["a"][0]) is float
    state = nn.BatchNorm1d(2).state_dict()
    assert plain_numbers(state) is state
    assert plain_numbers(result) is result


class Stored:
    """A scheduler that has an object in its state."""

    def __init__(self, optimizer, value):
        self.value = value

    def step(self):
        pass

    def state_dict(self):
        return {"own": {"value": self.value}}

    def load_state_dict(self, state):
        self.value = state["own"]["value"]


UNREADABLE = {"array": np.ones(2), "path": Path("a"), "function": len, "object": object(), "class": Stored}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_what_a_file_cannot_give_back_ends_the_run_before_its_first_step(tmp_path, value):
    settings = {"schedulers": {"optimizer": lambda o: Stored(o, value)}}
    path = r"updates\.schedulers\.optimizer\.own\.value is .* of type .*; give a number, a text, a tensor"
    runner = make(tmp_path, **settings)
    with pytest.raises(TypeError, match=path):
        runner.fit(1)
    assert runner.steps == 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=path):
        make(**settings).save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())
    assert len(make(**settings).fit(1)) == 1  # without files


class Remembering(SGD):
    """Has an object in its state from the first step on."""

    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["seen"] = object()


def test_what_appears_at_the_first_step_ends_the_run_there(tmp_path):
    runner = make(tmp_path, optimizer=partial(Remembering, lr=0.1), train_steps=2)
    with pytest.raises(
        TypeError, match=r"optimizers\.optimizer\.state\.0\.seen is .*object.* which a checkpoint cannot hold"
    ):
        runner.fit(5)
    assert runner.steps <= 2


@pytest.mark.parametrize("value", [torch.Size([2]), torch.float16, 1j, None, {1, 2}, b"a"])
def test_what_torch_reads_is_taken(value):
    check_readable({"a": [value]})
