"""Schedules between their values and at the ends of ranges; what a history, and a run with another range, make of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fxstn
from fxstn.hp import HyperparameterSpace
from fxstn.hp.hyperparameter import Hyperparameter
from tests.nets import mlp
from tests.runs import dataset, make
from tests.test_outcome import DECAY, RATE, history


@pytest.mark.parametrize("value", [3.0, 5.0, 0.95, 0.3, 1e-7])
def test_a_schedule_never_leaves_the_values_that_it_goes_between(value: float) -> None:
    schedule = fxstn.Schedule({"x": [value, value, 2 * value]})
    for parts in range(2, 60):
        assert all(schedule.at(part / parts)["x"] == value for part in range(parts + 1))
        assert all(value <= schedule.at(1 + part / parts)["x"] <= 2 * value for part in range(parts + 1))


def test_a_run_at_an_end_of_a_range_is_replayed_and_its_replay_has_the_same_schedule() -> None:
    specs = [fxstn.hp.Scalar("c", 5, 0, 5, integer=True, regularizes=True)]
    schedule = fxstn.Schedule({"c": [5, 5, 4, 5]})

    def replay(schedule: fxstn.Schedule) -> fxstn.History:
        stn = fxstn.transform(mlp(0.0), specs)
        batches = DataLoader(dataset(56, 0), 8)  # 7 in an epoch
        with pytest.warns(UserWarning, match="nothing reads c"):
            runner = fxstn.BilevelRunner(stn, F.cross_entropy, batches, batches, schedule=schedule, progress=False)
        return runner.fit(3)

    history = replay(schedule)
    assert history.schedule().values == schedule.values
    assert replay(history.schedule()).schedule().values == schedule.values


@pytest.mark.parametrize(
    "number", [Hyperparameter(8, 5, 50, integer=True, name="c"), Hyperparameter(8, 5, 50, name="c")]
)
def test_values_of_a_run_that_went_on_with_another_range_are_inside_it(number: Hyperparameter) -> None:
    run = history([3.0, 2.0, 1.0, 1.5], c=[2.0, 2.0, 60.0, 8.0])
    run.numbers = {"c": number}
    assert 5 <= run.outcome().values["c"] <= 50
    run.start, run.start_loss = {"c": 3.0}, 0.5
    assert run.outcome().values == {"c": 5}


def test_bad_schedules_are_refused_by_name(tmp_path: object) -> None:
    schedule = fxstn.Schedule({"x": [0.1, 0.2]}, unsettled=("x",))
    assert schedule.for_epochs(3).unsettled == ("x",)
    for method, epochs in ((schedule.at, -1), (schedule.at, math.nan), (schedule.until, -1), (schedule.for_epochs, 0)):
        with pytest.raises(ValueError, match=r"a schedule (begins at epoch 0|takes one epoch or more)"):
            method(epochs)
    assert schedule.at(math.inf) == {"x": 0.2}
    assert fxstn.Schedule.of({"x": np.float32(0.5), "y": np.int64(2)}).values == {"x": [0.5], "y": [2.0]}
    with pytest.raises(TypeError, match="needs finite numbers"):
        fxstn.Schedule({"x": [10**400]})
    Path(f"{tmp_path}/bad.json").write_text('{"format": "fxstn-schedule-1", "values": {"x": []}, "unsettled": null}')
    with pytest.raises(ValueError, match=r"bad\.json holds no whole schedule"):
        fxstn.Schedule.from_json(f"{tmp_path}/bad.json")
    run = make()
    run.fit(1)
    with pytest.raises(TypeError, match=r"refit: schedule must be a fxstn\.Schedule"):
        run.refit(DataLoader(dataset(60, 0), 8), schedule={"x": [1.0]})


def test_names_of_columns_that_the_history_has_are_refused() -> None:
    for name in ("response_norm", "taken_back", "scale:2.dropout", "linearization_error", "seconds"):
        for argument in ("metrics", "columns"):
            with pytest.raises(ValueError, match=rf"{argument}\['{name}'\]: the history has a column of that name"):
                make(**{argument: {name: lambda *_: 1.0}})
    with pytest.raises(ValueError, match=r"columns\['m'\]: the history has a column of that name"):
        make(metrics={"m": lambda output, target: 1.0}, columns={"m": lambda row: 2.0})


def test_values_that_are_set_are_all_set_or_none_is() -> None:
    space = HyperparameterSpace([RATE, DECAY])
    before = space.values()
    with pytest.raises(ValueError, match="decay=99 is outside"):
        space.set({"rate": 0.5, "decay": 99})
    assert space.values() == before


def test_numbers_of_numpy_in_a_row_are_written(tmp_path: object) -> None:
    run = history([1.0], rate=[0.1])
    run.rows[0]["late"] = np.float32(3)
    run.to_jsonl(f"{tmp_path}/rows.jsonl")
    assert '"late": 3.0' in Path(f"{tmp_path}/rows.jsonl").read_text()
