"""What a checkpoint holds, and what a run makes of one that was saved with other settings."""

from __future__ import annotations

import contextlib
import copy
import enum
import math
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

import fxstn
from fxstn import hp
from fxstn.bilevel.backtracking import Point
from fxstn.bilevel.checkpoint import load_checkpoint
from fxstn.bilevel.plain import check_readable, plain_numbers
from tests.nets import randomize_response
from tests.runs import make, same, without_times

# What a file holds


class Third(enum.IntEnum):
    three = 3


NUMPY = {
    "lr and betas": {
        "optimizer": lambda p: SGD(p, lr=np.logspace(-3, -1, 3)[1]),
        "response": {"optimizer": partial(torch.optim.Adam, betas=(np.float64(0.8), np.float64(0.99)))},
        "schedulers": {"optimizer": lambda o: schedules.StepLR(o, np.int64(1), gamma=np.float32(0.3))},
    },
    "momentum": {
        "optimizer": partial(SGD, lr=0.1, momentum=np.float32(0.3), dampening=np.float64(0.1)),
        "schedulers": {"optimizer": lambda o: schedules.CosineAnnealingLR(o, Third.three, np.float32(1e-3))},
    },
    "fraction": {
        "optimizer": partial(SGD, lr=Fraction(1, 3)),
        "schedulers": {"optimizer": lambda o: schedules.MultiStepLR(o, np.arange(1, 9, 2), gamma=0.3)},
    },
    "step schedulers": {"step_schedulers": {
        "response.optimizer": lambda o: schedules.LambdaLR(o, lambda n: np.float64(0.9) ** n),
        "optimizer": lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, np.float32(0.1)), schedules.ExponentialLR(o, np.float64(0.9))], [np.int64(4)]),
    }},
}  # fmt: skip


@pytest.mark.parametrize("settings", NUMPY.values(), ids=NUMPY)
def test_a_run_with_numbers_of_numpy_resumes_as_if_it_had_not_stopped(tmp_path, settings):
    settings = {"hparams": DROPOUT} | settings
    whole = make(**settings).fit(2)
    make(tmp_path, **settings).fit(1)
    assert without_times(make(tmp_path, **settings).fit(2)) == without_times(whole)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] >= 1


def test_a_run_with_numbers_of_numpy_goes_back_to_its_file(tmp_path):
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == 21 else 1.0)

    runner = make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy, **NUMPY["lr and betas"])
    with pytest.warns(fxstn.RunWarning, match=r"back to epoch 2 .*optimizer 0\.00045 "):
        assert len(runner.fit(4)) == 4


def test_plain_numbers_keep_values_and_structures():
    value = {np.str_("a"): [np.float32(0.1), (np.int64(2), np.bool_(True))], 3: {np.int64(1)}, "t": torch.ones(2)}
    result = plain_numbers(value)
    assert result == {"a": [float(np.float32(0.1)), (2, True)], 3: {1}, "t": value["t"]}
    assert [type(key) for key in result] == [str, int, str]
    assert type(result["a"][0]) is float
    state = nn.BatchNorm1d(2).state_dict()
    assert plain_numbers(state) is state
    rows = [{"a": (1, [2.0, None])}, {"b": (1, [np.float64(2.0)])}]
    assert plain_numbers(rows)[0] is rows[0]
    assert type(plain_numbers(rows)[1]["b"][1][0]) is float
    assert plain_numbers(result) is result


class MasterWeights(torch.optim.Optimizer):
    """Plain descent on weights in float64, rounded into their parameters; the sum of gradients lies in a list."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for x in (x for group in self.param_groups for x in group["params"] if x.grad is not None):
            state = self.state[x]
            state.setdefault("master", x.double())
            (total,) = state.setdefault("sum", [torch.zeros_like(x, dtype=torch.float64)])
            total += x.grad.double() / 3
            state["master"] -= self.param_groups[0]["lr"] * total
            x.copy_(state["master"])


def test_a_state_wider_than_its_parameters_goes_on_bit_for_bit(tmp_path):
    """torch casts the state to the type of the parameter on load."""
    settings = {"hparams": DROPOUT, "optimizer": MasterWeights}
    whole = make(**settings)
    whole.fit(3)
    make(tmp_path, **settings).fit(1)
    halves = make(tmp_path, **settings)
    halves.fit(3)
    states = [run.optimizers["optimizer"].state_dict() for run in (whole, halves)]
    assert states[0]["state"][0]["master"].dtype == torch.float64
    assert same(*states)


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


UNREADABLE = {"array": np.ones(2), "path": Path("a"), "function": len}


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
    runner = make(tmp_path, optimizer=partial(Remembering, lr=0.1), hyper={"train_steps": 2})
    with pytest.raises(
        TypeError, match=r"optimizers\.optimizer\.state\.0\.seen is .*object.* which a checkpoint cannot hold"
    ):
        runner.fit(5)
    assert runner.steps <= 2


class Number:
    """An object with a number that its owner changes."""

    def __init__(self):
        self.number = 0


class Numbering(Stored):
    def step(self):
        self.value.number += 1


def test_an_object_in_a_state_goes_back_with_a_run_without_files():
    calls, objects = [], []

    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == 21 else 1.0)

    def note(runner):
        objects.append(runner.updates.schedulers["optimizer"].value.number)

    numbering = {"schedulers": {"optimizer": lambda o: Numbering(o, Number())}, "callbacks": [note]}
    runner = make(hparams=[hp.Dropout("2")], loss_fn=loss_fn, valid_loss_fn=F.cross_entropy, **numbering)
    with pytest.warns(fxstn.RunWarning, match="back to epoch 2"):
        runner.fit(3)
    assert objects == [1, 2, 3]


class Own(fxstn.BilevelProblem):
    """Two numbers; and a state of its own, which it is given, or ranges."""

    def __init__(self, own=None, ranges=None):
        super().__init__()
        self.weight, self.number = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.own, self.all_ranges = own, ranges or {}

    def general_parameters(self):
        return [self.weight]

    def hyper_parameters(self):
        return [self.number]

    def general_loss(self, inputs, target):
        return ((self.weight - inputs) ** 2).mean()

    def hyper_loss(self, inputs, target):
        return ((self.number - inputs) ** 2).mean()

    def validation_loss(self, inputs, target):
        return self.general_loss(inputs, target), inputs

    def values(self):
        return {"number": self.number.item()}

    def ranges(self):
        return self.all_ranges

    def local_state(self):
        return {"own": self.own}

    def load_local_state(self, state):
        self.own = state["own"]

    def get_extra_state(self):
        return {"version": np.float64(0.5)}

    def set_extra_state(self, state):
        assert type(state["version"]) is float


def own_run(out_dir=None, **arguments):
    batches = [(torch.ones(4, 1), torch.ones(4, 1))]
    return fxstn.BilevelRunner(
        Own(**arguments), batches, batches, checkpoints=fxstn.CheckpointSettings(out_dir=out_dir), progress=False
    )


def test_the_state_of_a_problem_of_ones_own_is_plain_or_refused(tmp_path):
    own_run(tmp_path, own=[np.float32(0.5)]).fit(1)
    runner = own_run(tmp_path)
    runner.fit(1)
    assert runner.problem.own == [0.5]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["model"]["_extra_state"] == {"version": 0.5}
    with pytest.raises(TypeError, match=r"processes\.0\.problem\.own is .*array.* of type numpy\.ndarray, which"):
        own_run(tmp_path / "other", own=np.ones(2)).fit(1)


@pytest.mark.parametrize("value", [torch.Size([2]), torch.float16, 1j, None, {1, 2}, b"a"])
def test_what_torch_reads_is_taken(value):
    check_readable({"a": [value]})


# Settings that change

DROPOUT = [hp.Dropout("2", init=0.3)]


def states(runner):
    """The state of a run, without clocks."""
    state = copy.deepcopy((runner._checkpoints.parts.state_dict(), torch.get_rng_state()))
    state[0]["processes"][0]["means"].pop("seconds")
    return state


def resumed(path, saved, text, epochs=(1, 2), **settings):
    """A run with the settings `saved`, resumed with others. text: what the warning must say. None: there must be none."""
    make(path, **({"hparams": DROPOUT} | saved)).fit(epochs[0])
    runner = make(path, **({"hparams": DROPOUT} | settings))
    with pytest.warns(fxstn.RunWarning, match=text) if text else contextlib.nullcontext():
        runner.fit(epochs[1])
    return runner


def rate(runner):
    return runner.optimizers["optimizer"].param_groups[0]["lr"]


def sgd(**options):
    return {"optimizer": partial(SGD, **options)}


def by_epoch(schedule, *args, **options):
    return {"schedulers": {"optimizer": lambda o: schedule(o, *args, **options)}}


def by_step(schedule, *args, **options):
    return {"step_schedulers": {"optimizer": lambda o: schedule(o, *args, **options)}}


def test_a_new_learning_rate_acts_from_the_resume_on(tmp_path):
    """Reference: a run whose rate is set by hand after the first epoch. The same script once more says nothing."""
    new = sgd(lr=0.2, momentum=0.9)
    text = r"last\.pt was saved with other settings; this run takes anew: optimizer: lr=0\.2 \(was 0\.1\)$"
    runner = resumed(tmp_path, sgd(lr=0.1, momentum=0.9), text, **new)
    other = make(hparams=DROPOUT, **sgd(lr=0.1, momentum=0.9))
    other.fit(1)
    other.optimizers["optimizer"].param_groups[0]["lr"] = 0.2
    whole = without_times(other.fit(3))
    assert without_times(runner.history) == whole[:2]
    assert without_times(make(tmp_path, hparams=DROPOUT, **new).fit(3)) == whole


def test_a_schedule_goes_on_from_a_new_learning_rate(tmp_path):
    schedule = by_epoch(schedules.StepLR, 1, gamma=0.5)
    runner = resumed(tmp_path, sgd(lr=0.1) | schedule, r"lr=0\.3 \(was 0\.1, 0\.05 by now\)", **sgd(lr=0.3), **schedule)
    assert rate(runner) == pytest.approx(0.3 * 0.5**2)


CHANGED_SCHEDULES = {
    "a longer cosine": (
        (by_epoch(schedules.CosineAnnealingLR, 2), by_epoch(schedules.CosineAnnealingLR, 6)),
        "T_max=6 ",
    ),
    "another factor": (
        (by_epoch(schedules.StepLR, 1, 0.5), by_epoch(schedules.StepLR, 1, 0.1)),
        r"gamma=0\.1 \(was 0\.5\)",
    ),
    "a longer cycle": (
        (by_step(schedules.OneCycleLR, 0.1, 10), by_step(schedules.OneCycleLR, 0.1, 40)),
        "total_steps=40 ",
    ),
}


@pytest.mark.parametrize(("pair", "text"), CHANGED_SCHEDULES.values(), ids=CHANGED_SCHEDULES)
def test_a_schedule_with_other_settings_is_where_it_would_be(tmp_path, pair, text):
    """Reference: the rate of a run that had the new schedule from the start; the old one would end, or come to 0."""
    runner = resumed(tmp_path, pair[0], f"optimizer: its schedule as if from the start, {text}", (2, 3), **pair[1])
    other = make(hparams=DROPOUT, **pair[1])
    other.fit(3)
    assert rate(runner) == pytest.approx(rate(other), rel=1e-6)
    assert rate(runner) > 0


def test_rates_that_a_bad_loss_has_halved_stay_halved_under_another_schedule(tmp_path):
    first = make(tmp_path, hparams=DROPOUT, **by_epoch(schedules.StepLR, 1, 0.5))
    first.updates.slow("optimizer", 0.5)
    first.fit(1)
    runner = make(tmp_path, hparams=DROPOUT, **by_epoch(schedules.StepLR, 1, 0.1))
    with pytest.warns(fxstn.RunWarning, match="as if from the start"):
        runner.fit(2)
    assert rate(runner) == pytest.approx(0.01 * 0.5 * 0.1**2)


def test_averages_that_a_new_option_needs_begin_anew(tmp_path):
    adam = partial(torch.optim.Adam, lr=0.01)
    text = r"optimizer: amsgrad=True \(was False\), its averages begin anew"
    runner = resumed(tmp_path, {"optimizer": adam}, text, optimizer=partial(adam, amsgrad=True))
    assert all("max_exp_avg_sq" in state for state in runner.optimizers["optimizer"].state.values())
    text = "hyper.optimizer: limits=False .was True.$"
    runner = make(tmp_path, hparams=DROPOUT, optimizer=partial(adam, amsgrad=True),
                  hyper={"optimizer": partial(fxstn.optim.SettlingAdam, limits=False)})  # fmt: skip
    steps = load_checkpoint(tmp_path / "last.pt")["shared"]["counters"]["hyper_steps"]
    with pytest.warns(fxstn.RunWarning, match=text):
        runner.load(tmp_path / "last.pt")
    assert runner.optimizers["hyper.optimizer"].state[runner.stn.hparams.unconstrained]["step"] == steps > 0


TAKEN = {
    "steps": ({}, {"hyper": {"train_steps": 4}, "clip_norm": 1.0},
              r"anew: clip_norm=1\.0 \(was None\); hyper\.train_steps=4 \(was 2\)$"),
    "σ learned": ({}, {"hyper": {"tune_scale": True}}, "hyper.scale_optimizer: begins anew; hyper.tune_scale=True"),
    "σ kept": ({"hyper": {"tune_scale": True}}, {}, "no hyper.scale_optimizer; hyper.tune_scale=False"),
    "float16": ({}, {"execution": {"autocast": torch.float16}}, r"execution\.autocast=torch\.float16 \(was None\)"),
    "validation": ({}, {"valid_loss_fn": nn.CrossEntropyLoss()}, "valid_loss_fn=CrossEntropyLoss .was None"),
    "start": ({}, {"hparams": [hp.Dropout("2", init=0.4)]}, r"keeps the value of 2\.dropout \(init=0\.4 is for a new run\)$"),
    "scale": ({}, {"hparams": [hp.Dropout("2", init=0.3, scale=0.5)]}, r"2\.dropout with scale=0\.5$"),
    "around": ({"metrics": None}, {"callbacks": [fxstn.EarlyStopping(3)], "checkpoints": {"keep": 3, "save_minutes": 1}}, None),
}  # fmt: skip


@pytest.mark.parametrize(("saved", "settings", "text"), TAKEN.values(), ids=TAKEN)
def test_what_a_run_takes_anew_is_said(tmp_path, saved, settings, text):
    assert len(resumed(tmp_path, saved, text, **settings).history) == 2


def test_a_new_scale_is_taken(tmp_path):
    runner = resumed(tmp_path, {}, "scale=0", hparams=[hp.Dropout("2", init=0.3, scale=0.5)])
    assert runner.history["scale:2.dropout"] == pytest.approx([1.0, 0.5])


# Ranges

RANGES = {
    "lower": ([hp.Dropout("2", init=0.3, high=0.9)], [hp.Dropout("2", init=0.1, high=0.5)]),
    "higher": ([hp.Dropout("2", init=0.3, high=0.5)], [hp.Dropout("2", init=0.3, high=0.9)]),
    "log": ([hp.Scalar("a", 0.3, 0.01, 1.0)], [hp.Scalar("a", 0.3, 0.02, 2.0, log=True)]),
    "unbounded": ([hp.WeightDecay("0")], [hp.WeightDecay("0", low=0, high=math.inf)]),
    "integer": ([hp.Scalar("a", 3, 1, 5, integer=True)], [hp.Scalar("a", 3, 0, 9, integer=True)]),
    "no integer": ([hp.Scalar("a", 3, 1, 5, integer=True)], [hp.Scalar("a", 3, 0, 9)]),
}


def reads_hparams(output, target, hparams=None):
    return F.cross_entropy(output, target)


def slope(runner):
    """dv/dx of the first hyperparameter, before an integer is rounded down."""
    bijection, x = runner.stn.hparams.bijection, runner.stn.hparams.unconstrained.detach().clone().requires_grad_()
    before, bijection.any_integer = bijection.any_integer, False
    (gradient,) = torch.autograd.grad(bijection(x)[0], x)
    bijection.any_integer = before
    return gradient[0].item()


@pytest.mark.parametrize(("old", "new"), RANGES.values(), ids=RANGES)
def test_a_value_stays_where_its_range_changes_and_so_does_what_belongs_to_it(tmp_path, old, new):
    """The value; the spread of the values, the weights and the gradients per unit of the value."""
    other = hp.Dropout("5", init=0.2)
    first = make(loss_fn=reads_hparams, hparams=[*old, other], hyper={"train_steps": 1})
    first.stn.hparams.unconstrained.data[0] += (
        0.01 if not old[0].numbers.get("a") or old[0].numbers["a"].init < 1 else 0.0
    )
    randomize_response(first.stn)
    for _ in range(2):
        first.stn.hparams.unconstrained.grad = torch.tensor([0.3, -0.2])
        first.optimizers["hyper.optimizer"].step()
    first.stn.hparams.unconstrained.grad = None
    first._tuner.backtracking.points.append(Point(1.0, 1.0, first.stn.hparams.unconstrained.tolist()))
    first.save(tmp_path / "run.pt")
    runner = make(loss_fn=reads_hparams, hparams=[*new, other], hyper={"train_steps": 1})
    with pytest.warns(fxstn.RunWarning, match=r"takes anew: .* in \[.*\] .*\(was \["):
        runner.load(tmp_path / "run.pt")
    assert runner.stn.hparams.values() == pytest.approx(first.stn.hparams.values(), rel=1e-5)
    assert not runner._tuner.backtracking.points  # places in the old units: none to go back to
    ratio = slope(runner) / slope(first)
    spaces = first.stn.hparams, runner.stn.hparams
    assert spaces[1].scale[0].item() == pytest.approx(spaces[0].scale[0].item() / ratio, rel=1e-4)
    delta = torch.tensor([0.01, 0.0])
    before, after = first.stn.best_response(delta), runner.stn.best_response(delta / ratio)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)
    averages = [run.optimizers["hyper.optimizer"].state[run.stn.hparams.unconstrained] for run in (first, runner)]
    for key, power in (("mean", 1), ("square", 2), ("surprise", 2)):
        torch.testing.assert_close(averages[1][key][0], averages[0][key][0] * ratio**power, rtol=1e-4, atol=0)
        assert averages[1][key][1] == averages[0][key][1]
    for key in ("unconstrained", "raw_scale"):
        assert getattr(spaces[1], key)[1] == getattr(spaces[0], key)[1]


def test_training_goes_on_in_another_range(tmp_path):
    """Case: dropout of 0.3 in [0, 0.9] went on at 0.167 in [0, 0.5]."""
    old, new = RANGES["lower"]
    text = r"2\.dropout in \[0, 0\.5\] \(was \[0, 0\.9\]\); it keeps the value of 2\.dropout"
    runner = resumed(tmp_path, {"hparams": old}, text, (1, 3), hparams=new)
    rows = runner.history["2.dropout"]
    assert rows[0] == pytest.approx(0.3, abs=0.02)
    assert rows[1] == pytest.approx(rows[0], abs=0.05)


def test_the_ranges_of_a_problem_of_ones_own_cannot_be_converted(tmp_path):
    runners = [own_run(ranges=ranges) for ranges in ({}, {"number": (0.0, 1.0)}, {"number": (0.0, 2.0)})]
    for number, runner in enumerate(runners):
        runner.save(tmp_path / f"{number}.pt")
        runner.load(tmp_path / f"{number}.pt")
    for number, old in ((0, "no range"), (1, r"\[0, 1\]")):
        with pytest.raises(
            ValueError, match=rf"has number in {old}, this run in \[0, 2\], and λ of such a problem cannot"
        ):
            runners[2].load(tmp_path / f"{number}.pt")


def test_a_metric_that_is_added_is_a_column_from_there_on(tmp_path):
    runner = resumed(tmp_path, {"metrics": None}, None, metrics={"accuracy": fxstn.accuracy})
    first, second = runner.history["accuracy"]
    assert math.isnan(first)
    assert 0 <= second <= 1
    with pytest.raises(KeyError, match=r"has no column .acuracy.; it has train_loss, .*accuracy"):
        runner.history["acuracy"]


# Refusals

REFUSED = {
    "value outside": ({"hparams": [hp.Dropout("2", init=0.3)]}, {"hparams": [hp.Dropout("2", init=0.1, high=0.2)]},
                      r"has 2\.dropout at 0\.3, which is not in its new range \[0, 0\.2\]; give a range with this value"),
    "not whole": ({"hparams": [hp.Scalar("a", 0.3, 0, 2)], "loss_fn": reads_hparams},
                  {"hparams": [hp.Scalar("a", 1, 0, 2, integer=True)], "loss_fn": reads_hparams},
                  r"has a as any number in \[0, 2\], this run as an integer; choose another out_dir, or leave out integer"),
    "method stn": ({"hparams": [hp.Dropout("2", high=0.9)], "method": "stn"}, {"hparams": [hp.Dropout("2")], "method": "stn"},
                   r"has 2\.dropout in \[0, 0\.9\], this run in \[0, 0\.95\], and λ of such a problem cannot be converted"),
    "shared": ({"hparams": [hp.Dropout("2", shared=True)]}, {"hparams": [hp.Dropout("2", "5", shared=True)]},
               r"has dropout for Dropout at '2', this run for Dropout at '2', Dropout at '5'; choose another out_dir"),
    "names": ({}, {"hparams": [hp.Dropout("2", shared=True)]}, r"hyperparameters \['2\.dropout'\], this run \['dropout'\]"),
    "norm": ({"hparams": [hp.WeightDecay("0")]}, {"hparams": [hp.WeightDecay("0", norm=1)]}, r"this run \['0\.l1_decay'\]"),
    "ema gone": ({"ema": 0.9}, {}, r"has averages \(ema\) True, this run False; choose another out_dir, or the same settings"),
    "shorter cycle": (by_step(schedules.OneCycleLR, 0.1, 20), by_step(schedules.OneCycleLR, 0.1, 3),
                      r"has 5 steps of optimizer, which its new schedule cannot follow \(.*is 3\); give one that is longer"),
    "parameters in another order": (
        sgd(lr=0.1), {"optimizer": lambda p: SGD(p[::-1], lr=0.1)}, "has optimizer over its parameters in another order; give"),
    "scheduler": ({}, by_epoch(schedules.StepLR, 1), r"has schedulers \{\}, this run \{'optimizer': 'StepLR'\}; choose"),
}  # fmt: skip


@pytest.mark.parametrize(("saved", "settings", "text"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, saved, settings, text):
    first = make(**({"hparams": DROPOUT} | saved))
    first.fit(1)
    first.save(tmp_path / "run.pt")
    runner = make(**({"hparams": DROPOUT} | settings))
    before = states(runner)
    with pytest.raises(ValueError, match=text):
        runner.load(tmp_path / "run.pt")
    assert same(states(runner), before)


@pytest.mark.parametrize("part", ["problem", "stepper", "best"])
def test_a_part_that_fails_to_load_leaves_the_run_as_it_was(tmp_path, monkeypatch, part):
    make(tmp_path, hparams=DROPOUT).fit(2)
    runner = make(hparams=DROPOUT)
    before = states(runner)
    parts = runner._checkpoints.parts
    broken = parts.problem if part == "problem" else parts.all_shared()[part]
    loads, load = [], broken.load_state_dict

    def fails_once(state):
        loads.append(state)
        if len(loads) == 1:
            raise KeyError("nothing like it")
        load(state)

    monkeypatch.setattr(broken, "load_state_dict", fails_once)
    with pytest.raises(
        ValueError, match=r"last\.pt cannot be loaded by this run, which is as it was \(KeyError: 'nothing"
    ):
        runner.load(tmp_path / "last.pt")
    assert len(loads) == 2
    assert same(states(runner), before)


@pytest.mark.parametrize("added", [10, 100])
def test_saves_within_an_epoch_change_no_column(tmp_path, added, monkeypatch):
    """Sums of losses in float32 depend on which of them are added up together."""
    monkeypatch.setattr("fxstn.bilevel.running_means.ADDED", added)
    rows = []
    for minutes in (30.0, 1e-9):
        settings = {"save_minutes": minutes, "out_dir": tmp_path / str(minutes)}
        rows.append(without_times(make(None, train=203, checkpoints=settings).fit(2)))
    assert rows[0] == rows[1]
