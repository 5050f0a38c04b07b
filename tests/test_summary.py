"""What print(stn) says: what is tuned, what responds, what it costs."""

from __future__ import annotations

import re
from operator import sub

import pytest
import torch
from torch import nn

import fxstn
from fxstn import hp
from fxstn.bilevel.cadence import Cadence, Counters, steps_of_run
from fxstn.ir.cost import cost_ratio
from fxstn.tools.verify import Check, VerifyResult
from tests.nets import mlp
from tests.runs import make


def test_a_network_prints_what_it_tunes_and_what_responds():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    model[4].bias.requires_grad_(False)
    stn = fxstn.transform(model, [hp.Dropout("2", init=0.3), hp.Dropout("3", init=0.2), hp.WeightDecay()])
    shown = str(stn).splitlines()
    assert shown == stn.summary().splitlines()
    assert shown[:4] == [
        "Sequential that tunes itself: method 'delta', followed by trace='fx'",
        "tuned: 4 hyperparameters",
        "  dropout × 2: start 0.2 to 0.3, in [0, 0.95]",
        "  weight_decay × 2: start 0.0005, in [1e-07, 0.1]",
    ]
    moved = [name for name, _ in model.named_parameters() if name in dict(stn.response.named_modules())]
    assert moved == ["1.weight", "1.bias", "4.weight"]  # those before a norm do not, nor what is frozen
    assert shown[4] == "responds: 3 of 6 parameters, 88 of 205 elements (43%)"
    assert shown[5] == "  not: 0.weight, 0.bias, 4.bias"


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_a_summary_is_about_ten_lines_whatever_is_tuned(method):
    specs = [hp.Dropout(), hp.WeightDecay("*"), *(hp.Scalar(f"s{i}", 0.5, 0, 1) for i in range(7))]
    shown = fxstn.transform(mlp(), specs, method=method).summary().splitlines()
    assert len(shown) <= 12
    assert "  … and 5 more kinds" in shown
    assert any(line.startswith("cost") for line in shown) == (method != "stn")


def test_the_cost_of_a_summary_is_that_of_the_steps_of_a_run():
    first, last = map(float, re.findall(r"(\d\.\d\d) times.* (\d\.\d\d) later", str(fxstn.transform(mlp())))[0])
    before, after = steps_of_run(52), steps_of_run(112)  # response steps have become rarer, and no cycle is longer yet
    assert first == pytest.approx(cost_ratio(60, *map(sub, after, before)), abs=0.01)
    optimizer = fxstn.optim.SettlingAdam([torch.zeros(1)])
    rare = Cadence(fxstn.ResponseSettings(), fxstn.HyperSettings(), optimizer, Counters(10**6, hyper_steps=10**6))
    assert last == pytest.approx(cost_ratio(1, 1 / rare.response_interval, 1 / rare.cycle_length), abs=0.01)


def test_a_run_its_history_and_its_schedule_print_what_they_are():
    runner = make(train=24)
    assert repr(runner) == (
        "BilevelRunner(steps=0, response_steps=0, hyper_steps=0, device=cpu, history=History(epochs=0, hyperparameters=3))"
    )
    history = runner.fit(2)
    best = history.best()
    end = f"best_epoch={best['epoch']:.0f}, valid_loss={best['valid_loss']:.4g})"
    assert repr(history) == f"History(epochs=2, hyperparameters=3, {end}"
    steps = f"steps=6, response_steps={runner.response_steps}, hyper_steps={runner.hyper_steps}"
    assert repr(runner) == f"BilevelRunner({steps}, device=cpu, history={history!r})"


def test_a_schedule_prints_where_its_values_begin_and_end():
    assert repr(fxstn.Schedule({"a": [0.1, 0.25], "b": [2.0, 2.0]})) == "Schedule(epochs=1; a 0.1 to 0.25, b 2)"
    many = fxstn.Schedule.of({f"n{i}": float(i) for i in range(30)})
    assert repr(many) == "Schedule(epochs=0; n0 0, n1 1, n2 2, n3 3, and 26 more)"


def test_a_run_that_was_not_made_prints_that():
    with pytest.raises(TypeError) as failure:
        fxstn.BilevelRunner(fxstn.transform(mlp()), 3, [1], [1])
    frames = [frame.frame.f_locals for frame in failure.traceback]
    runners = [frame["self"] for frame in frames if isinstance(frame.get("self"), fxstn.BilevelRunner)]
    assert {repr(runner) for runner in runners} == {"BilevelRunner(unfinished)"}


def test_the_prompt_shows_what_print_shows():
    stn = fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)])
    assert repr(stn.hparams).splitlines() == [
        "HyperparameterSpace(",
        "  2.dropout: start 0.3 (init=), in [0, 0.95]",
        ")",
    ]
    for shown in (fxstn.explain(stn), VerifyResult(1e-6, [Check("eval", "original model", 0, 3e-9)])):
        assert repr(shown) == str(shown)
    assert repr(VerifyResult(1e-6)) == "nothing was compared"
    assert repr(hp.Auxiliary()) == "hp.Auxiliary()"
    assert repr(hp.MixUp(init=0.3)) == "hp.MixUp(init=0.3, low=0, high=2)"
