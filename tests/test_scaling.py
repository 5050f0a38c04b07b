"""float16: a step whose gradient overflows counts for nothing, in w₀, Θ, λ, schedulers, averages and everything else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.scaling import MOST_OVERFLOWS, LossScaler
from fxstn.bilevel.sequences import CarriedState
from fxstn.ir.cost import RAMP
from fxstn.ir.input_errors import explanation
from tests.nets import randomize_response
from tests.runs import dataset, grouped, make, same, without_times
from tests.test_language import make as windows

CPU = torch.device("cpu")
OVERFLOW, NO_NUMBER = 1e30, math.nan  # factors of a loss: its gradient is beyond float16; it is itself no number


def overflowing(runner, objective, calls, factor=OVERFLOW):
    """Multiply the loss of an objective by a factor, at these of its calls."""
    original, count = getattr(runner.problem, objective), iter(range(10**6))
    setattr(runner.problem, objective, lambda *batch: original(*batch) * (factor if next(count) in calls else 1))
    return runner


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=1e-4),
    "default": None,
    "fused Adam": lambda p: Adam(p, lr=0.1, fused=True),
    "foreach SGD": lambda p: SGD(p, lr=1e-4, momentum=0.9, nesterov=True, foreach=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_whose_first_steps_overflow_trains(optimizer):
    """Targets near 30: gradients overflow until the scale has fallen. The optimizer has no memory of the steps left out."""

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(640, 20)
    y = 10 * x[:, :1] + 30
    train, valid = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 512, 32)], [(x[512:], y[512:])]
    stn, settings = (
        fxstn.transform(net, [hp.Dropout("0")]),
        {"execution": fxstn.ExecutionSettings(autocast=torch.float16), "progress": False},
    )
    runner = fxstn.BilevelRunner(stn, F.mse_loss, train, valid, optimizer=optimizer, **settings)
    half = runner.fit(4)
    assert 4 <= 4 * 16 - runner.steps <= 16
    assert all(math.isfinite(row[name]) for row in half for name in ("train_loss", "valid_loss", "0.dropout"))
    assert not runner.warnings
    for state in runner.optimizers["optimizer"].state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if value is not None)
    assert half["valid_loss"][-1] < 0.97 * half["valid_loss"][0]


def build(batches=12, left_out=(), **settings):
    """A run without noise, in which a step moves all that can move.

    left_out: the training batches that do not come.
    """
    torch.manual_seed(0)
    x, y = dataset(4 * batches, 0).tensors
    train = [(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) for i in range(batches) if i not in left_out]
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    stn = fxstn.transform(net, [hp.WeightDecay(shared=True)], method=settings.pop("method", "delta"))
    by_step = {name: lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8) for name in ("optimizer", "hyper.optimizer")}
    hyper = {"optimizer": Adam, "train_steps": 2, "recalibrate": 2}
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        train,
        [dataset(16, 1).tensors],
        ema=0.9,
        clip_norm=0.5,
        optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9),
        step_schedulers=by_step,
        **grouped(settings, hyper=hyper, response={"every": 2}, execution={"autocast": torch.float16}, progress=False),
    )
    runner.problem.perturb = torch.tensor([0.7])
    for scaler in runner.updates.scalers.values():
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**13})  # at which nothing overflows by itself
    return runner


def learned(runner):
    """The state of a run, but for its place in the loaders, times, and the scales, which an overflow is to change."""
    state = copy.deepcopy(runner._checkpoints.parts.state_dict()["shared"])
    del state["updates"]["scalers"]
    return state | {"history": without_times(state["history"]["rows"]), "local": runner.problem.local_state()}


# Scales are powers of two. Gradients that float16 rounds at one scale and not at another differ: method "stn" has such.
@pytest.mark.parametrize(("method", "factor"), [("delta", OVERFLOW), ("delta", NO_NUMBER), ("stn", NO_NUMBER)])
def test_batches_that_overflow_count_as_if_they_had_not_come(method, factor):
    """Bit for bit; also the first one of all, and all of a cycle."""
    bad = {0, 3, 4, 5, 7}
    runner = overflowing(build(method=method), "general_loss", bad, factor)
    other = build(left_out=bad, method=method)
    runner.fit(1)
    other.fit(1)
    assert runner.steps == other.steps == 7
    assert runner.hyper_steps == other.hyper_steps == 3
    assert same(learned(runner), learned(other))
    assert other.stn.hparams.unconstrained.item() != build().stn.hparams.unconstrained.item()


@pytest.mark.parametrize("factor", [OVERFLOW, NO_NUMBER])
@pytest.mark.parametrize(
    ("step", "objective", "method"),
    [("response", "response_loss", "delta"), ("hyper", "hyper_loss", "delta"), ("hyper", "hyper_loss", "stn")],
)
def test_a_step_of_the_response_or_of_lambda_that_overflows_changes_nothing(step, objective, method, factor):
    runner = build(method=method, hyper={"tune_scale": True})
    runner.fit(1)
    overflowing(runner, objective, {0}, factor)
    batch = next(iter(runner.valid_loader))
    argument = batch if step == "hyper" else [batch]
    before = learned(runner)
    take = getattr(runner._tuner.stepper, step)
    assert take(argument) is None
    assert same(learned(runner), before)
    assert take(argument) is not None
    assert not same(learned(runner), before)


def test_a_warm_up_has_not_begun_while_all_steps_overflow():
    """An epoch without a step ends, and its losses are no numbers."""
    runner = overflowing(build(8, hyper={"recalibrate": 0}), "general_loss", range(8))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in runner.optimizers.values()]
    (row,) = runner.fit(1)
    assert [optimizer.param_groups[0]["lr"] for optimizer in runner.optimizers.values()] == rates
    assert runner.steps == runner.hyper_steps == runner.response_steps == 0
    assert math.isnan(row["train_loss"])
    assert math.isfinite(row["valid_loss"])


def test_a_response_step_and_a_hyper_step_that_overflow_are_still_due():
    """Of Θ on the next batch; of λ on the next validation batch, before training goes on."""
    runner = build(6, response={"every": 3}, hyper={"valid_steps": 2})  # steps of Θ: 3, 6; of λ: two after 2, 4, 6
    runner._tuner.counters.steps = RAMP * 3
    overflowing(runner, "response_loss", {0, 1})
    overflowing(runner, "hyper_loss", {1, 2, 5})
    runner.fit(1)
    assert (runner.steps, runner.response_steps, runner.hyper_steps) == (RAMP * 3 + 6, 2, 6)
    scales = {name: scaler.get_scale() for name, scaler in runner.updates.scalers.items()}
    assert scales == {"train_loss": 8192.0, "response_loss": 2048.0, "hyper_loss": 1024.0}


@pytest.mark.parametrize("objective", ["general_loss", "response_loss", "hyper_loss"])
def test_what_no_scale_cures_is_a_bad_loss(objective):
    runner = overflowing(build(40, checkpoints={"rollbacks": 0}, response={"every": 1}), objective, range(1, 100))
    with pytest.raises(
        fxstn.DivergedError, match=f"_loss = .* overflowed float16 {MOST_OVERFLOWS} times in a row .*bfloat16"
    ):
        runner.fit(1)
    assert all(torch.isfinite(tensor).all() for tensor in runner.stn.state_dict().values())


def test_a_batch_whose_activations_overflow_leaves_no_trace_in_batch_norms():
    """Neither in training nor in the statistics of evaluation, which its batch is among."""
    runner = build(4, hyper={"recalibrate": 10})
    runner.train_loader[2][0].fill_(1e6)
    (row,) = runner.fit(1)
    assert runner.steps == 3
    assert math.isfinite(row["valid_loss"])
    assert all(torch.isfinite(tensor).all() for tensor in runner.stn.state_dict().values())


@pytest.mark.parametrize("objective", ["general_loss", "response_loss", "hyper_loss"])
def test_a_state_that_is_carried_over_is_that_before_the_overflow(objective):
    """A window whose loss is no number would hand NaN on to all that follow."""
    runner = windows(execution={"autocast": torch.float16}, response={"windows": 2}, checkpoints={"rollbacks": 0})
    original, seen = getattr(runner.problem, objective), []

    def poisoned(inputs, target):
        seen.append(copy.deepcopy(runner.problem.local_state()))
        loss = original(inputs, target)
        if len(seen) == 2:
            for carried in vars(runner.problem).values():
                if isinstance(carried, CarriedState) and carried.state is not None:
                    carried.state = tuple(h * math.nan for h in carried.state)
            return loss * math.nan
        return loss

    setattr(runner.problem, objective, poisoned)
    runner.fit(2)
    part = {"general_loss": 0, "response_loss": 1, "hyper_loss": 2}[objective]
    assert same(seen[2]["carried"][part], before := seen[1]["carried"][part])
    assert before is not None
    assert all(math.isfinite(row["train_loss"]) for row in runner.history)


def noisy(n, generator):
    x = torch.randn(n, 20, generator=generator)
    return TensorDataset(x, torch.sin(2 * x[:, :1]) + x[:, 1:2] / 2 + torch.randn(n, 1, generator=generator) / 2)


def last_loss(seed, epochs, precision, every=50):
    """The mean validation loss of the last five epochs, of 20 steps each.

    every: in float16 each loss overflows once in so many of its steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(0)
    loaders = [DataLoader(noisy(400, generator), 20, shuffle=True) for _ in range(2)]
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))
    stn = fxstn.transform(net, [hp.Dropout(), hp.WeightDecay(shared=True)])
    places = []
    runner = fxstn.BilevelRunner(
        stn,
        F.mse_loss,
        *loaders,
        execution=fxstn.ExecutionSettings(autocast=precision),
        checkpoints=fxstn.CheckpointSettings(rollbacks=0),
        progress=False,
        callbacks=[lambda runner: places.append(stn.hparams.unconstrained.detach().clone())],
    )
    if precision is torch.float16:
        for objective in ("general_loss", "response_loss", "hyper_loss"):
            overflowing(runner, objective, range(every - 1, 10**6, every), 1e8)
    history = runner.fit(epochs)
    assert torch.isfinite(torch.stack(places)).all()
    assert not torch.equal(places[0], places[-1])
    skipped = 20 * epochs - runner.steps
    assert skipped == 0 if precision is None else skipped >= 20 * epochs // every
    return sum(history["valid_loss"][-5:]) / 5


@pytest.mark.filterwarnings("ignore:epoch .* linearised loss:fxstn.RunWarning")
@pytest.mark.parametrize(
    ("epochs", "plain_seeds", "half_seeds"),
    [(15, (0, 3), (0,)), pytest.param(500, range(3), range(3), marks=pytest.mark.nightly)],
)
def test_a_run_that_overflows_in_every_fiftieth_step_ends_within_the_spread_of_float32(epochs, plain_seeds, half_seeds):
    """300 steps, and 10,000."""
    plain = [last_loss(seed, epochs, None) for seed in plain_seeds]
    half = [last_loss(seed, epochs, torch.float16) for seed in half_seeds]
    assert min(plain) <= sum(half) / len(half) <= max(plain), (plain, half)


# The scale


def scaled_steps(factors):
    """Scales after steps on a parameter that is read in float16.

    factors: of the loss of each step; at 1.0 it does not overflow.
    """
    scaler, x = LossScaler(CPU, enabled=True), nn.Parameter(torch.ones(2))
    scales = []
    for factor in factors:
        loss = x.half().float().sum() * factor
        x.grad = None
        scaler.scale(loss).backward()
        assert scaler.unscale([SGD([x], lr=0.1)], loss.detach()) == (factor == 1)
        if factor == 1:
            assert torch.equal(x.grad, torch.ones(2))
        scales.append(scaler.get_scale())
    return scales


def test_the_scale_falls_only_where_a_lower_one_can_help():
    assert scaled_steps([1e6, 1.0, 1e6, math.inf, math.nan, 1.0]) == [2.0**power for power in (15, 15, 14, 14, 14, 14)]
    assert min(scaled_steps([1e6 if step % 50 == 0 else 1.0 for step in range(850)])) == 1.0
    assert scaled_steps([1e6] * 20)[-1] == 2.0**-4


def test_without_a_gradient_there_is_no_overflow():
    scaler = LossScaler(CPU, enabled=True)
    assert scaler.unscale([SGD([nn.Parameter(torch.ones(2))], lr=0.1)], torch.tensor(1.0))


def test_parameters_in_float16_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"autocast=torch\.float16 .* 0\.weight is in float16: leave out \.half\(\)"):
        half(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).half())
    net = nn.Sequential(nn.Linear(6, 8).half().requires_grad_(False), nn.Linear(8, 3))
    half(net).fit(1)


def test_a_kernel_that_the_cpu_lacks_in_float16_is_told_with_another_type():
    """torch's LSTM on most CPUs."""
    error = RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive.\nRun")
    assert "train in another, torch.bfloat16" in explanation(error, torch.ones(2, 3), nn.Linear(3, 1))


def half(net):
    data = [dataset(16, 0).tensors]
    stn = fxstn.transform(net, [hp.WeightDecay("1")])
    return fxstn.BilevelRunner(
        stn, F.cross_entropy, data, data, execution=fxstn.ExecutionSettings(autocast=torch.float16), progress=False
    )


@pytest.mark.parametrize("responds", [False, True])
def test_in_a_loop_of_ones_own_the_hypergradient_of_an_overflow_is_not_finite(responds):
    """So that docs/guides/own.md can say what to drop; also before Θ has moved from zero."""
    stn = fxstn.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), [hp.WeightDecay(shared=True)])
    if responds:
        randomize_response(stn)
    optimizer = SGD(stn.general_parameters(), lr=0.1)
    gradients = []
    for scale in (2.0**10, 2.0**30):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = fxstn.general_loss(stn, F.cross_entropy, *dataset(8, 0).tensors)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(stn.hypergradient())
    assert torch.isfinite(gradients[0]).all()
    assert not torch.isfinite(gradients[1]).any()


# Resume


def large(output, target):
    return 3e3 * F.cross_entropy(output, target)


def test_a_run_whose_steps_overflow_resumes_bit_for_bit(tmp_path):
    """Scales are part of the state, those of steps that are still due too."""
    settings = {
        "execution": {"autocast": torch.float16},
        "loss_fn": large,
        "hyper": {"optimizer": Adam},
        "ema": 0.9,
        "response": {"every": 3},
    }
    settings |= {"optimizer": lambda p: Adam(p, lr=1e-3)}
    make(tmp_path, **settings).fit(2)
    resumed = make(tmp_path, **settings)
    resumed.fit(4)
    whole = make(**settings)
    whole.fit(4)
    assert 0 < whole.steps <= 4 * 5 - 3
    assert same(without_times(resumed.history), without_times(whole.history))
    states = [runner._checkpoints.parts.state_dict()["shared"]["updates"] for runner in (resumed, whole)]
    assert same(*states)


def test_a_run_in_float16_goes_on_from_one_in_float32_and_the_other_way_round(tmp_path):
    """With the first scale, and without one."""
    make(tmp_path).fit(1)
    runner = make(tmp_path, execution={"autocast": torch.float16})
    with pytest.warns(fxstn.RunWarning, match=r"takes anew: execution\.autocast=torch\.float16 \(was None\)$"):
        assert len(runner.fit(2)) == 2
    assert runner.updates.scalers["train_loss"].get_scale() == 2.0**16
    with pytest.warns(fxstn.RunWarning, match=r"takes anew: execution\.autocast=None \(was torch\.float16\)$"):
        assert len(make(tmp_path).fit(3)) == 3
