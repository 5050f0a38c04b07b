"""What a run has come to: means and spreads on λ's scale, whether it has settled, what is said at the end."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fxstn
from fxstn.bilevel.outcome import end_signs
from fxstn.hp import HyperparameterSpace
from fxstn.hp.hyperparameter import Hyperparameter
from tests.nets import mlp
from tests.runs import dataset, make

RATE = Hyperparameter(0.1, 0.0, 0.95, name="rate")
DECAY = Hyperparameter(1e-3, 1e-6, 1e-1, log=True, name="decay")
HOLES = Hyperparameter(1, 0, 5, integer=True, name="holes")


def history(losses: list[float], **columns: list[float]) -> fxstn.History:
    rows = [
        {"epoch": float(number), "valid_loss": loss} | {name: column[number - 1] for name, column in columns.items()}
        for number, loss in enumerate(losses, 1)
    ]
    numbers = {number.name: number for number in (RATE, DECAY, HOLES)}
    starts = {name: numbers[name].init if name in numbers else 0.0 for name in columns}
    return fxstn.History(tuple(columns), rows, starts, numbers)


def mean_of(values: list[float], low: float, high: float) -> float:
    """The value at the mean of the logits of two values' places in a range."""
    places = [(value - low) / (high - low) for value in values]
    mean = statistics.mean(math.log(place / (1 - place)) for place in places)
    return low + (high - low) / (1 + math.exp(-mean))


def test_values_are_means_of_lambda_over_the_second_half_up_to_the_best_epoch_or_weaker_ones_of_that() -> None:
    """Rates rise and fall, alike but for whether they regularise; the last epoch is not the best one."""
    up, down, holes = [0.1, 0.2, 0.3, 0.4, 0.9], [0.4, 0.3, 0.4, 0.2, 0.1], [1, 2, 3, 5, 5]
    decays = [1e-4, 1e-3, 1e-3, 1e-2, 5e-2]
    columns = {
        "rate": up,
        "other": down,
        "decay": decays,
        "holes": holes,
        "free": down,
        "mine": [1.0, 2.0, 6.0, 7.0, 8.0],
    }
    run = history([3.0, 2.0, 1.5, 1.0, 1.5], **columns)
    others = {"other": replace(RATE, name="other"), "free": replace(RATE, name="free", regularizes=False)}
    run.numbers = {**run.numbers, **others}
    outcome = run.outcome()
    assert outcome.epoch == 4
    assert outcome.values == {
        "rate": pytest.approx(mean_of([0.3, 0.4], 0, 0.95)),
        "other": 0.2,
        "decay": pytest.approx(math.exp(mean_of([math.log(1e-3), math.log(1e-2)], math.log(1e-6), math.log(1e-1)))),
        "holes": math.floor(mean_of([3.5, 5.5], 0, 6)),
        "free": pytest.approx(mean_of([0.4, 0.2], 0, 0.95)),
        "mine": 6.5,
    }
    assert outcome.values["holes"] == 4


ENDS = [
    {"low": 1e-6, "high": 1e3, "log": True}, {"low": 1e-30, "high": 1e30, "log": True}, {"low": 0, "high": 1e12},
    {"low": 0.5, "high": 0.5000001, "log": True}, {"low": 0, "high": 3e38}, {"low": -1e6, "high": 1e-3},
    {"low": -1e11, "high": 1e11}, {"low": 2e10, "high": 1e11}, {"low": 2e-38, "high": 3e38, "log": True},
]  # fmt: skip


@pytest.mark.parametrize("of", ENDS, ids=str)
def test_a_value_at_an_end_of_any_range_has_a_point_and_the_middle_of_both_ends_is_in_the_middle(of) -> None:
    low, high = of["low"], of["high"]
    middle = math.sqrt(low * high) if of.get("log") else (low + high) / 2
    number = Hyperparameter(middle, **of, regularizes=False, name="x")
    assert math.isfinite(replace(number, init=math.nextafter(high, low)).unconstrained)
    for values in ([low, low], [high, high], [low, high], [high, middle]):
        run = history([2.0, 2.0, 2.0, 1.0], x=[middle, middle, *values])
        run.numbers = {"x": number}
        assert low <= run.outcome().values["x"] <= high
        assert math.isfinite(run.outcome().spread["x"])
    if of.get("log"):
        run = history([2.0, 2.0, 2.0, 1.0], x=[middle, middle, low, high])
        run.numbers = {"x": number}
        assert run.outcome().values["x"] == pytest.approx(middle, rel=1e-3)


def test_an_epoch_without_a_loss_is_not_the_best() -> None:
    assert history([math.nan, 2.0, 1.0], rate=[0.1, 0.2, 0.3]).best()["epoch"] == 3
    run = history([math.nan, math.nan], rate=[0.2, 0.3])
    run.start_loss = 1.0
    assert run.outcome().epoch == 0


def test_the_spread_is_the_deviation_of_lambda_in_units_of_the_value() -> None:
    columns = {"rate": [0.1, 0.2, 0.4, 0.3, 0.9], "mine": [1.0, 2.0, 6.0, 7.0, 8.0]}
    outcome = history([3.0, 2.0, 1.5, 1.0, 1.5], **columns).outcome()
    points = [math.log(rate / (0.95 - rate)) for rate in (0.4, 0.3)]
    mean, deviation = statistics.mean(points), statistics.pstdev(points)
    ends = [0.95 / (1 + math.exp(-mean + sign * deviation)) for sign in (1, -1)]
    assert outcome.spread["rate"] == pytest.approx((ends[1] - ends[0]) / 2)
    assert outcome.spread["mine"] == pytest.approx(0.5)
    first = history([1.0, 2.0], rate=[0.3, 0.9]).outcome()
    assert (first.values, first.spread) == ({"rate": 0.3}, {"rate": 0.0})
    at_ends = {"rate": [0.0, 0.95, 0.0, 0.95], "decay": [1e-6, 1e-1, 1e-6, 1e-1], "holes": [0, 5, 0, 5]}
    ends = history([1.0] * 3 + [0.9], **at_ends).outcome()
    assert ends.values["rate"] == pytest.approx(0.475)
    assert all(map(math.isfinite, ends.spread.values()))


def test_a_start_that_no_epoch_betters_has_the_values() -> None:
    """An equal loss is not better, and `best_model` is then the start, too."""
    run = history([2.0, 1.0], rate=[0.3, 0.4])
    run.start_loss = 1.0
    assert run.outcome().epoch == 0
    assert run.best_values() == run.start


def test_small_values_of_a_range_without_upper_end_are_told_apart() -> None:
    number = Hyperparameter(1e-3, 0, math.inf, name="decay")
    run = history([1.0] * 8, decay=[10.0**-k for k in range(6, 14)])
    run.numbers = {"decay": number}
    assert run.outcome().unsettled == ("decay",)
    space = HyperparameterSpace([number])
    space.set({"decay": 1e-8})
    assert space.values() == pytest.approx({"decay": 1e-8})


def drift(total: float, noise: float, epochs: int = 24) -> list[float]:
    """A rate whose λ moves by so much in the last quarter, as steadily as in the others, and goes up and down besides."""
    steps = [-1.0 + total * k / 6 + noise * (-1) ** k for k in range(epochs)]
    return [0.95 / (1 + math.exp(-point)) for point in steps]


@pytest.mark.parametrize(
    ("column", "unsettled"),
    [(drift(0.0, 0.3), False), (drift(0.1, 0.0), False), (drift(0.5, 0.0), True), (drift(-0.5, 0.2), True),
     (drift(1.0, 0.0)[:3], False), (drift(0.5, 0.0)[::4] + [0.6] * 18, False)],
    ids=["noise", "slow", "rises", "falls and is noisy", "too short to tell", "settled late"],
)  # fmt: skip
def test_lambda_has_settled_where_it_no_longer_drifts(column: list[float], unsettled: bool) -> None:
    run = history([1.0] * len(column), rate=column)
    assert run.outcome().unsettled == (("rate",) if unsettled else ())
    assert run.outcome().settled is not unsettled
    schedule = fxstn.Schedule(run.schedule().values, run.schedule().unsettled)
    if unsettled:
        with pytest.warns(UserWarning, match=r"the last values of rate are not what the run has come to"):
            assert schedule.final().values == {"rate": [column[-1]]}
    else:
        schedule.final()
    run.schedule(best=True).final()


def test_a_schedule_in_a_file_still_says_what_has_not_settled(tmp_path: object) -> None:
    path = f"{tmp_path}/schedule.json"
    history([1.0] * 24, rate=drift(0.5, 0.0)).schedule().to_json(path)
    assert fxstn.Schedule.from_json(path).unsettled == ("rate",)


def said(losses: list[float], start: float | None = None) -> list[str]:
    return [sign for sign, _ in end_signs([{"valid_loss": loss} for loss in losses], start)]


def test_what_is_said_at_the_end_of_a_run() -> None:
    falling = [2.0 - 0.08 * k for k in range(12)]
    assert said(falling) == ["learning"]
    assert said([*falling, 1.2]) == []  # the best epoch is not the last
    assert said([*falling[:8], *[1.4 - 0.001 * k for k in range(8)]]) == []  # as good as over
    assert said([1.0 + 0.1 * (-1) ** k - 0.001 * k for k in range(12)]) == []  # noise
    assert said(falling[:5]) == []  # too short to tell
    assert said([1.0, 0.9, 0.85], start=0.8) == ["start"]
    assert said([1.0, 0.9, 0.7], start=0.8) == []
    assert said([1.0], start=0.8) == []  # too short to tell
    assert said([1.0, 0.9, 0.805], start=0.8) == []  # about the same


def test_a_run_worse_than_its_start_hands_out_the_start(tmp_path: object) -> None:
    torch.manual_seed(0)
    network = mlp(0.0)
    batches = DataLoader(dataset(40, 0), 8)
    for _ in range(30):
        for x, y in batches:
            F.cross_entropy(network(x), y).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    runner = fxstn.BilevelRunner(
        fxstn.transform(network, [fxstn.hp.Dropout("2", init=0.3)]), F.cross_entropy, batches, batches,
        optimizer=lambda p: torch.optim.SGD(p, lr=3.0), progress=False,
        checkpoints=fxstn.CheckpointSettings(out_dir=str(tmp_path)),
    )  # fmt: skip
    with pytest.warns(fxstn.RunWarning, match=r"no epoch has a validation loss below that of the start"):
        run = runner.fit(3)
    assert run.start_loss is not None
    assert run.start_loss < min(run["valid_loss"])
    assert run.best() == {"epoch": 0, "valid_loss": run.start_loss} | run.start
    assert run.schedule(best=True).values == {"2.dropout": [run.start["2.dropout"]]}
    for one, other in zip(runner.best_model().parameters(), network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.load(f"{tmp_path}/best.pt", weights_only=True)["epoch"] == 0
    assert run.outcome().epoch == 0
    assert run.outcome().values == pytest.approx({"2.dropout": 0.3})
    assert run.best_values() == run.outcome().values
    runner.refit(batches, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert len(runner.refit_history) == 3


def test_a_refit_takes_the_outcome() -> None:
    runner = make()
    outcome = runner.fit(3).outcome()
    runner.refit(DataLoader(dataset(60, 0), 8))
    assert len(runner.refit_history) == outcome.epoch
    assert {name: runner.refit_history.rows[0][name] for name in outcome.values} == pytest.approx(
        outcome.values, rel=1e-5
    )
