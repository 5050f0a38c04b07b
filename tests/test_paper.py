"""The paper's experiments: that they are the paper's, that the optima are exact, that a cell runs and resumes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxstn
from benchmarks.paper import __main__ as paper
from benchmarks.paper import inert, linear, report
from benchmarks.paper.tasks import METHODS, ROWS, START
from benchmarks.trials import search
from benchmarks.tuning import TASKS


@pytest.mark.parametrize(
    ("row", "count", "parameters"),
    [("mnist", 3, 3_836_410), ("fmnist", 6, None), ("cifar10-alexnet", 18, None), ("cifar10-vgg16", 26, None),
     ("cifar10-resnet18", 19, 11_173_962)],
)  # fmt: skip
def test_rows_tune_as_many_hyperparameters_as_the_papers_from_its_starts(row, count, parameters):
    model = ROWS[row].network()
    stn = fxstn.transform(model, ROWS[row].specs(START, 1.0))
    values = stn.hparams.values()
    assert len(values) == count
    assert all(value == pytest.approx(0.05) for name, value in values.items() if name.endswith("dropout"))
    if row.startswith("cifar10"):
        assert {name: values[f"input.{name}"] for name in ("rotation", "shear", "holes", "length")} == pytest.approx(
            {"rotation": 5.0, "shear": 5.0, "holes": 1.0, "length": 4.0}
        )
        assert values["input.hue"] == pytest.approx(0.05)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters


def regression(n: int = 60, features: int = 4) -> linear.Problem:
    torch.manual_seed(0)
    X, noise = torch.randn(2 * n, features).double(), torch.randn(2 * n).double()
    X = (X - X[:n].mean(0)) / X[:n].std(0)
    y = X @ torch.tensor([1.0, 0.5, 0.0, 0.0]).double() + 2 * noise
    return linear.Problem(X[:n], y[:n], X[n:], y[n:])


def objective(kind: str, problem: linear.Problem, w: torch.Tensor, strength: float) -> torch.Tensor:
    """L_T by its definition."""
    if kind == "dropout":  # the mean over all masks
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * len(w))
        chance = (strength ** (1 - masks) * (1 - strength) ** masks).prod(1)
        errors = [((problem.X * mask / (1 - strength)) @ w - problem.y).square().mean() for mask in masks]
        return (chance * torch.stack(errors)).sum()
    penalty = {"l2": 0.5 * strength * w.square().sum(), "network": strength * w.square().sum()}[kind]
    return (problem.X @ w - problem.y).square().mean() + penalty


@pytest.mark.parametrize(
    ("kind", "strengths"), [("l2", (1e-3, 0.3, 5.0)), ("dropout", (0.05, 0.5)), ("network", (0.01, 1.0))]
)
def test_the_exact_solution_is_where_the_training_loss_is_least(kind, strengths):
    problem = regression()
    for strength in strengths:
        w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure(w=w, optimizer=optimizer, strength=strength):
            optimizer.zero_grad()
            loss = objective(kind, problem, w, strength)
            loss.backward()
            return loss

        optimizer.step(closure)
        expected = (problem.X_valid @ w.detach() - problem.y_valid).square().mean().item()
        assert problem.best_loss(linear.KINDS[kind], strength) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("kind", list(linear.KINDS))
def test_no_strength_is_better_than_the_optimum(kind):
    problem = regression()
    best, least = problem.optimum(linear.KINDS[kind])
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 1.5):
        strength = min(factor * best, 0.999) if kind == "dropout" else factor * best
        assert problem.best_loss(linear.KINDS[kind], strength) >= least - 1e-12


def test_a_linear_run_ends_near_the_exact_optimum(monkeypatch):
    monkeypatch.setattr(linear, "problem", lambda name, root, seed: regression())
    outcome = linear.run("any", "l2", "delta", 0.1, 1.0, 0, None, 60)
    assert outcome["excess"] < 0.02
    assert outcome["trajectory"][0] == [0, 0.1]
    assert math.isfinite(outcome["final"])


def test_a_linear_network_has_no_bottleneck_and_starts_well_scaled():
    model = linear._model(4, 5)
    assert [layer.weight.shape for layer in model] == [(4, 4)] * 5 + [(1, 4)]
    assert isinstance(model[0], nn.Linear)


def tiny_mnist(command, out):
    """The command line of its smallest run."""
    return ["benchmarks.paper", *f"{command} --task mnist --budget tiny --seed 0 --out".split(), str(out)]


@pytest.mark.nightly
def test_cells_run_resume_and_are_reported(tmp_path, monkeypatch, capsys):
    """On scikit-learn's digits in MNIST's place."""
    pytest.importorskip("sklearn", reason="the digits come with the extra fxstn[data]")
    optuna = pytest.importorskip("optuna", reason="searches need the extra fxstn[search]")
    monkeypatch.setitem(ROWS, "mnist", replace(ROWS["mnist"], data="digits"))
    monkeypatch.setattr(paper, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    command = tiny_mnist("run", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", command)
    paper.main()
    results = json.loads((tmp_path / "results" / "tiny-mnist.json").read_text())
    assert {key.split()[0] for key in results} == set(METHODS)
    assert len(results["random 0"]) == len(results["bayes 0"]) == ROWS["mnist"].budgets["tiny"].trials
    assert len(results["delta 0"]["schedule"]["input.dropout"]) == 3
    before = (tmp_path / "results" / "tiny-mnist.json").read_text()
    paper.main()  # nothing is missing
    assert (tmp_path / "results" / "tiny-mnist.json").read_text() == before
    studies = paper.journal(tmp_path / "out" / "tiny" / "mnist")
    unchanged = optuna.load_study(study_name="tpe 0", storage=studies).trials
    assert [trial.value for trial in unchanged] == pytest.approx([cell["valid"] for cell in results["bayes 0"]])
    shown = report.table("mnist", "tiny")
    assert shown.count("\n") == 1 + len(METHODS)
    assert "0.040 (0.038)" in shown


def test_a_search_goes_on_from_its_results_with_and_without_its_storage(tmp_path, monkeypatch):
    """Trials cut short have failed, pruned ones stay pruned."""
    optuna = pytest.importorskip("optuna", reason="searches need the extra fxstn[search]")
    task = replace(TASKS["diabetes-mlp"], epochs=2)
    cells = [search(task, "random-halving", 0, None, []) | {"pruned": True, "valid": 2.0}]
    storage = paper.journal(tmp_path)
    study = optuna.create_study(storage=storage, study_name="random-halving 0")
    study.ask()
    cells.append(search(task, "random-halving", 0, None, cells, storage))
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "PRUNED", "PRUNED" if cells[1]["pruned"] else "COMPLETE"]
    assert study.trials[1].params == cells[0]["shares"]
    again = search(task, "random-halving", 0, None, cells, storage)
    assert again["shares"] == search(task, "random-halving", 0, None, cells)["shares"] != cells[1]["shares"]
    assert len(study.trials) == 4


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.* became (nan|inf) in .*back to epoch:fxstn.RunWarning")
def test_robustness_is_over_starts_and_scales_and_a_run_that_diverges_at_once_is_a_result(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with the extra fxstn[data]")
    pytest.importorskip("matplotlib", reason="pictures need the extra fxstn[plot]")
    for module in (paper, report):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(paper, "INITIAL", {"start": (START, 0.4), "scale": (1.0, 2.0)})
    command = tiny_mnist("robustness", tmp_path)
    for method, rate in (("delta", 1e-2), ("stn", 1e30)):
        monkeypatch.setitem(ROWS, "mnist", replace(ROWS["mnist"], data="digits", rate=rate))
        monkeypatch.setattr(sys, "argv", [*command, "--method", method])
        paper.main()
    outcome = report.robustness("mnist", "tiny")
    at = [(START, 1.0), (0.4, 1.0), (START, 2.0)]
    assert set(outcome) == {(method, *where) for method in ("delta", "stn") for where in at}
    assert all(0 < outcome["delta", *where][0] < 3 for where in at)
    lines = report.robustness_table(outcome).splitlines()[2:]
    assert [tuple(map(float, line.split("|")[1:3])) for line in lines] == at
    assert all("diverges" in line for line in lines)
    report.draw_robustness(outcome, tmp_path / "robustness.png")
    assert (tmp_path / "robustness.png").stat().st_size > 10_000


def test_what_does_nothing_is_reported_from_every_start(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with the extra fxstn[data]")
    pytest.importorskip("matplotlib", reason="pictures need the extra fxstn[plot]")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    cells = {f"{m} {start} 0": inert.run(m, start, 0, epochs=2) for m in ("stn", "default") for start in inert.STARTS}
    assert all(len(cell["trajectory"]) == 3 for cell in cells.values())
    cells["stn 0.1 0"]["trajectory"][-1] = 0.5  # ln(9) = 2.197 up
    (tmp_path / "inert.json").write_text(json.dumps(cells))
    assert "2.197 (1 of 1 up)" in report.inert_table()
    report.draw_inert(tmp_path / "inert.png")
    assert (tmp_path / "inert.png").stat().st_size > 10_000
