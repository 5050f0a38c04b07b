"""benchmarks/worth: columns give finite numbers and go on where they stopped; the report ranks by hand-made cells."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.worth import cells, columns, report
from benchmarks.worth.__main__ import fill
from benchmarks.worth.cells import Trial
from benchmarks.worth.implicit import Relaxation
from benchmarks.worth.networks import mlp
from benchmarks.worth.report import Entry
from benchmarks.worth.searches import Halving
from benchmarks.worth.tasks import Task
from benchmarks.worth.training import Limits, Plain


def rows(seed):
    """Three sets of rows whose target is their sum."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, 4, generator=generator) for count in (24, 12, 12)]
    return tuple(TensorDataset(x, x.sum(1, keepdim=True)) for x in parts)


TINY = Task("rows", rows, partial(mlp, (4, 8, 1), 0.2), partial(torch.optim.Adam, lr=1e-2), 0.2, 3, 8, loss=F.mse_loss,
            metric="rmse")  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The task "tiny" alone, and a folder for its cells."""
    monkeypatch.setattr(columns, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(report, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    return tmp_path / "tiny.json"


@pytest.mark.parametrize("name", [name for name in columns.COLUMNS if name not in ("trivial", "cpr", "ours")])
def test_a_column_gives_finite_cells_and_is_not_run_twice(tiny, name):
    run = {"test": 1.0, "metric": 1.0, "seconds": 0.02, "epochs": 3, "best_epoch": 3}
    cells.add("tiny", {cells.key_of("time", "ours", "recipe", 0): run})
    assert columns.missing("tiny", "time", name, "recipe", 0, cells.read("tiny"))
    columns.run("tiny", "time", name, "recipe", 0)
    assert not columns.missing("tiny", "time", name, "recipe", 0, cells.read("tiny"))
    made = [cell for key, cell in cells.read("tiny").items() if key != "time ours recipe 0"]
    assert len(made) == len(columns.COLUMNS[name].makes)
    for cell in made:
        assert all(math.isfinite(cell[number]) for number in ("test", "metric", "seconds"))
        assert {"torch", "commit"} <= set(cell)
        assert name == "recipe-all" or math.isfinite(cell["refit"]["test"])


def test_our_column_tunes_and_refits(tiny):
    columns.run("tiny", "time", "ours", "low", 0)
    cell = cells.read("tiny")["time ours low 0"]
    assert cell["schedule"]["2.dropout"][0] == pytest.approx(0.02, abs=1e-4)
    assert math.isfinite(cell["test"])
    assert math.isfinite(cell["refit"]["test"])
    assert not list(tiny.parent.glob("tiny.[0-9]*"))  # written under another name, then renamed


def test_a_column_without_the_run_whose_time_it_takes_is_named_and_the_others_go_on(tiny):
    (failure,) = fill([("tiny", "time", name, "recipe", 0) for name in ("plain-long", "recipe-all")])
    assert "plain-long" in failure
    assert "time ours recipe 0" in failure
    assert list(cells.read("tiny")) == ["time recipe-all recipe 0"]


def fixture():
    """One task, two seeds: losses of the recipe, of plain training and of ours, in which ours wins when it is trained anew."""
    losses = {"plain": (0.5, 0.7), "recipe": (0.4, 0.5), "ours": (0.4, 0.6)}
    refits = {"plain": (0.45, 0.62), "recipe": (0.3, 0.5), "ours": (0.25, 0.41)}
    return {
        "tiny": {
            f"time {name} recipe {seed}": {
                "test": losses[name][seed], "metric": 0.5, "seconds": 2.0 if name == "ours" else 1.0, "epochs": 3,
                "refit": {"test": refits[name][seed], "metric": 0.5, "seconds": 1.0},
            }
            for name in losses for seed in (0, 1)
        }
    }  # fmt: skip


def test_ranks_are_those_by_hand():
    found = fixture()["tiny"]
    entries = [Entry(name, refit) for name in ("plain", "recipe", "ours") for refit in (False, True)]
    # Seed 0: 0.5, 0.45, 0.4, 0.3, 0.4, 0.25 → 6, 5, 3.5, 2, 3.5, 1.
    # Seed 1: 0.7, 0.62, 0.5, 0.5, 0.6, 0.41 → 6, 5, 2.5, 2.5, 4, 1.
    assert list(report.ranks(entries, found, "time").values()) == [6, 5, 3, 2.25, 3.75, 1]
    assert report.lowest(entries, found, "time") == Entry("ours", True)


def test_an_entry_with_fewer_seeds_is_compared_on_those_that_it_has():
    found = fixture()["tiny"]
    found["time cpr recipe 1"] = found["time plain recipe 1"] | {
        "test": 0.45
    }  # above ours at seed 0, and no loss there
    del found["time cpr recipe 1"]["refit"]
    entries = [Entry(name, refit) for name in ("plain", "recipe", "ours") for refit in (False, True)]
    ranks = report.ranks([*entries, Entry("cpr", False)], found, "time")
    # Against it, at seed 1: 0.7, 0.62, 0.5, 0.5 and 0.6 are higher, 0.41 is lower.
    assert list(ranks.values()) == [7, 6, 4, 3.25, 4.75, 1, 2]
    found["time cpr recipe 1"]["test"] = 0.40  # with one seed it is no lowest, and is not counted
    assert report.lowest([*entries, Entry("cpr", False)], found, "time") == Entry("ours", True)
    assert report.standings([*entries, Entry("cpr", False)], {"tiny": found}, "time")[Entry("cpr", False)].count == 0


def test_within_the_spread_means_by_at_most_the_deviation_of_the_paired_difference():
    assert report.difference({0: 1.0, 1: 2.0}, {0: 0.9, 1: 1.6}) == pytest.approx((0.25, math.sqrt(0.045)))
    assert not report.within({0: 1.0, 1: 2.0}, {0: 0.9, 1: 1.6})
    assert report.within({0: 1.0, 1: 2.0}, {0: 0.7, 1: 2.0})
    assert not report.within({0: 1.0}, {0: 0.99})


def test_the_summary_counts_wins_and_times():
    lines = [line.split("|") for line in report.summary(fixture(), "time").splitlines()[2:]]
    table = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    assert next(iter(table)) == "fxstn, refit"
    assert table["fxstn, refit"] == ["1.0", "1 of 1 ± 0.0", "1 of 1 ± 0.0", "3.0", "2"]
    assert table["the recipe, refit"] == ["2.2", "0 of 1 ± 0.0", "0 of 1 ± 0.0", "2.0", "2"]
    assert json.dumps(report.against_recipe(fixture(), "time")).count("lower") == 2


def test_halving_promotes_the_best_third_of_a_rung_once():
    halving = Halving(9)
    assert halving.rungs == [1, 3, 9]
    halving.losses[0] = {0: 3.0, 1: 1.0}
    assert halving.next() is None  # a third of two is none
    halving.losses[0][2] = 2.0
    assert halving.next() == (1, 1)
    assert halving.next() is None
    halving.losses[0] |= {3: 0.5, 4: 0.7, 5: 4.0}
    halving.losses[1] = {1: 0.9, 3: 0.4, 4: 0.6}
    assert [halving.next() for _ in range(4)] == [(3, 2), (3, 1), (4, 1), None]


def best_weights(x, y, decay):
    """The minimum of mean squares + ½ decay ‖w‖²."""
    return torch.linalg.solve(2 / len(x) * x.T @ x + decay * torch.eye(x.shape[1], dtype=x.dtype), 2 / len(x) * x.T @ y)


def test_implicit_differentiation_finds_the_derivative_at_the_optimum():
    linear = replace(TINY, network=lambda: nn.Sequential(nn.Linear(4, 1, bias=False)),
                     optimizer=partial(torch.optim.SGD, lr=0.1))  # fmt: skip
    training = Relaxation(Trial(linear, 0, "high", Limits(1), 0.0))
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(20, 4, generator=generator) for _ in range(2))
    y, yv = (part.sum(1, keepdim=True) + torch.randn(20, 1, generator=generator) for part in (x, xv))
    training.run.network[0].weight.data = best_weights(x, y, training.strengths.values()["weight_decay"].item()).T

    def cost(logit):
        training.strengths.logits.data.fill_(logit)
        w = best_weights(x.double(), y.double(), training.strengths.values()["weight_decay"].item())
        return F.mse_loss(xv.double() @ w, yv.double()).item()

    (at,) = training.strengths.logits.tolist()
    ours = training.hypergradient((x, y), (xv, yv), terms=200).item()
    assert ours == pytest.approx((cost(at + 0.05) - cost(at - 0.05)) / 0.1, rel=1e-2)


def test_implicit_differentiation_goes_through_attention():
    def scores(x):
        return F.scaled_dot_product_attention(x.view(-1, 1, 2, 2), x.view(-1, 1, 2, 2), x.view(-1, 1, 2, 2)).flatten(1)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(self.drop(scores(self.first(x))))

    training = Relaxation(Trial(replace(TINY, network=Attending), 0, "recipe", Limits(1), 0.0))
    train, valid, _ = rows(0)
    gradient = training.hypergradient(train.tensors, valid.tensors)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_strengths_act_on_dropout_and_decay():
    run = Plain(TINY, {"dropout": 0.3, "weight_decay": 0.1}, 0)
    assert [m.p for m in run.network.modules() if isinstance(m, nn.Dropout)] == [0.3]
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
