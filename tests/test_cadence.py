"""When response and hyper steps are due, and how much an evaluation measures: by counts of steps alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.allowance import DIAGNOSTICS, LEAST, STEP, Allowance
from fxstn.bilevel.cadence import Cadence, Counters, steps_of_run
from fxstn.bilevel.faults import PERSISTENT, signs
from fxstn.bilevel.history import History
from fxstn.bilevel.optim import SettlingAdam
from fxstn.ir.cost import RAMP

RESPONSE, HYPER = fxstn.ResponseSettings(), fxstn.HyperSettings()


def settling(**options):
    return SettlingAdam([nn.Parameter(torch.zeros(2))], **options)


def due_steps(steps, response=RESPONSE, hyper=HYPER, optimizer=None, counters=None):
    """(inner steps with a response step, inner steps with a hyper step, inner steps whose gradient is noted)."""
    counters = counters or Counters()
    cadence = Cadence(response, hyper, settling() if optimizer is None else optimizer, counters)
    responses, hypers, noted = [], [], []
    for _ in range(steps):
        notes = cadence.ends_cycle_soon
        responds, over = cadence.count()
        noted += [counters.steps] if notes else []
        if responds:
            responses.append(counters.steps)
            cadence.count_response()
        if over:
            hypers.append(counters.steps)
            counters.hyper_steps += hyper.valid_steps
    return responses, hypers, noted


def test_intervals_grow_as_the_rate_of_lambda_falls_from_those_of_a_short_run():
    responses, hypers, _ = due_steps(100_000)
    assert hypers[:25] == list(range(5, 126, 5))
    assert responses[:29] == [
        *range(1, 16),
        *range(17, 32, 2),
        *range(34, 47, 3),
        50,
    ]  # rarer by one after 16 steps each
    assert responses[29:48] == list(range(54, 127, 4))
    gaps = [after - before for before, after in itertools.pairwise(hypers)]
    assert gaps == [min(max(round(5 * math.sqrt(n / 25)), 5), 40) for n in range(1, len(hypers))]
    assert gaps[-1] == HYPER.longest_cycle
    assert len(responses) / len(hypers) == pytest.approx(5 / 4, rel=0.01)
    # units of arithmetic, of which a plain step has 3: those of the general step are what is left in the end
    assert [round(sum(s <= steps for s in (*responses, *hypers)) / steps, 2) for steps in (100, 1000, 10_000)] == [
        0.61, 0.3, 0.14
    ]  # fmt: skip
    assert steps_of_run(1000) == tuple(sum(s <= 1000 for s in steps) for steps in (responses, hypers))


@pytest.mark.parametrize(
    ("response", "hyper", "optimizer"),
    [
        (*fxstn.PAPER.values(), torch.optim.RMSprop([nn.Parameter(torch.zeros(2))])),
        (*fxstn.PAPER.values(), settling()),  # a preset with another optimizer
        (RESPONSE, dataclasses.replace(HYPER, longest_cycle=1), settling()),
        (RESPONSE, HYPER, torch.optim.Adam([nn.Parameter(torch.zeros(2))])),
        (RESPONSE, HYPER, settling(settle=math.inf)),
    ],
)
def test_intervals_stay_where_they_are_fixed_or_the_rate_does_not_fall(response, hyper, optimizer):
    responses, hypers, noted = due_steps(1000, response, hyper, optimizer)
    assert hypers == list(range(5, 1001, 5))
    regular = [step for step in responses if step > RAMP * response.every]
    assert regular == list(range(regular[0], 1001, response.every))
    assert regular[0] <= (RAMP + 1) * response.every
    assert noted == list(range(1, 1001))


def test_windows_that_share_a_perturbation_have_a_response_step_at_each():
    responses, hypers, _ = due_steps(1000, fxstn.ResponseSettings(every=1, windows=2))
    assert responses == list(range(1, 1001))
    assert len(hypers) == 127  # of 200 in cycles of 5


def test_a_hyper_step_reads_the_gradients_of_as_many_inner_steps_however_long_the_cycle():
    _, hypers, noted = due_steps(5000)
    last = [[s for s in noted if a < s <= b] for a, b in zip([0, *hypers], hypers, strict=False)]
    assert all(steps == list(range(b - 4, b + 1)) for steps, b in zip(last, hypers, strict=True))


def test_a_cadence_goes_on_amid_a_cycle():
    whole = due_steps(700)
    counters = Counters()
    first = due_steps(333, counters=counters)
    resumed = Counters()
    resumed.load_state_dict(counters.state_dict())
    rest = due_steps(367, counters=resumed)
    assert tuple(a + b for a, b in zip(first, rest, strict=True)) == whole


@pytest.mark.parametrize("epoch", [1, 6, 12, 100, 1000])
def test_evaluations_take_their_share_whatever_the_length_of_an_epoch(epoch):
    steps = 24_000
    allowances = [Allowance(0.02, now - epoch, now) for now in range(epoch, steps + 1, epoch)]
    forwards = sum(each.loss_batches + DIAGNOSTICS * each.diagnostics for each in allowances)
    assert forwards <= (0.75 * 0.02 + 0.0005) * STEP * steps
    assert sum(each.loss_batches for each in allowances) == pytest.approx(0.01 * STEP * steps, rel=0.02)
    assert allowances[0].diagnostics
    assert allowances[0].loss_batches > 0
    assert all(each.statistics_batches >= LEAST for each in allowances)
    assert Allowance(0.02, 10_000, 10_000 + epoch).statistics_batches <= max(LEAST, 0.005 * STEP * epoch)


@pytest.mark.parametrize(("examples", "batches"), [(None, 4), (10, 4), (42, 4), (43, 3), (50, 3), (1024, 3)])
def test_statistics_of_large_batches_need_fewer(examples, batches):
    assert Allowance(0.02, 0, 6, examples).statistics_batches == batches
    assert Allowance(0.9, 0, 60, examples).statistics_batches == 40


def test_a_whole_share_measures_everything_in_every_epoch():
    allowance = Allowance(1.0, 120, 132)
    assert allowance.diagnostics
    assert min(allowance.loss_batches, allowance.statistics_batches) >= 9
    steps = [Allowance(0.02, s, s + 12).loss_batches for s in range(0, 276, 12)]
    assert steps[0] == 3  # √S at first
    assert sum(steps) == math.floor(math.sqrt(276))


def runner(valid_size=4, **hyper):
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    stn = fxstn.transform(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), [hp.Dropout("1")])
    parts = (slice(24), 4), (slice(24, 64), valid_size)
    loaders = [DataLoader(TensorDataset(x[part], y[part]), size) for part, size in parts]
    settings = fxstn.HyperSettings(**hyper)
    return fxstn.BilevelRunner(stn, F.cross_entropy, *loaders, progress=False, hyper=settings)


def test_short_epochs_leave_measurements_out_and_their_cells_are_empty(tmp_path):
    short, whole = runner(), runner(evaluation_share=1.0)
    short.fit(16)
    whole.fit(3)
    measured = [["response_norm" in row, "clean_train_loss" in row] for row in short.history]
    assert measured[0] == [True, True]
    assert [sum(column) for column in zip(*measured, strict=True)] == [
        1,
        8,
    ]  # √96 batches, two at first and then one at a time
    assert all("response_norm" in row and "clean_train_loss" in row for row in whole.history)
    short.history.to_csv(tmp_path / "history.csv")
    heads, *lines = [line.split(",") for line in (tmp_path / "history.csv").read_text().splitlines()]
    assert lines[1][heads.index("response_norm")] == ""
    assert math.isnan(short.history["linearization_error"][1])


def test_the_gap_of_a_short_epoch_is_that_of_several_measurements():
    tuner = runner()._tuner
    tuner.history.rows += [
        {"clean_train_loss": 1.0, "valid_loss": 1.0},
        {"valid_loss": 7.0},
        {"clean_train_loss": math.nan, "valid_loss": 7.0},
        {"clean_train_loss": 0.5, "valid_loss": 1.0},
    ]
    row = {"clean_train_loss": 0.3, "valid_loss": 1.0}
    assert tuner._gap(row, LEAST) == pytest.approx(0.7)
    assert tuner._gap(row, LEAST - 1) == pytest.approx(1 - 0.8 / 2)
    assert tuner._gap(row, 1) == pytest.approx(1 - 1.8 / 3)


def test_diagnostics_see_few_examples():
    trained = runner(valid_size=40)
    sizes = []
    trained.problem.diagnostics = lambda inputs, target, seed: sizes.append(len(inputs)) or {}
    trained.fit(1)
    assert sizes == [32]


def test_a_sign_lasts_over_rows_that_do_not_measure_it():
    rows = [{"epoch": n, "valid_loss": 1.0} | ({"response_norm": 2.0} if n % 3 == 1 else {}) for n in range(1, 8)]
    assert [sign for sign, _ in signs(rows, {})] == ["response"]
    assert not list(signs(rows[:-1], {}))
    assert PERSISTENT == 3


def test_a_history_of_rows_without_a_column_has_it_empty():
    history = History((), [{"epoch": 1, "response_norm": 0.5}, {"epoch": 2}])
    assert math.isnan(history["response_norm"][1])
    assert history.tagged(history.rows[1]) == {}


def test_an_optimizer_of_ones_own_keeps_the_cadence_of_a_run():
    own, settling = runner(optimizer=partial(torch.optim.Adam, lr=0.01)), runner()
    for each in (own, settling):
        each._tuner.counters.steps, each._tuner.counters.hyper_steps = 1000, 200
        each.fit(6)
    assert (own.steps, own.hyper_steps, own.response_steps) == (1036, 207, 9)
    assert (settling.steps, settling.hyper_steps, settling.response_steps) == (1036, 202, 3)
