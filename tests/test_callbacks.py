"""Callbacks of other libraries: the same ones for a BilevelRunner and for a loop of the user's own."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.integrations.optuna import report_to


def model_and_data() -> tuple[nn.Module, DataLoader, DataLoader]:
    torch.manual_seed(0)
    x = torch.randn(48, 5)
    rows = TensorDataset(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    return model, DataLoader(rows, 12), DataLoader(rows, 24)


def run(epochs: int, callback: Callable) -> Any:
    model, train, valid = model_and_data()
    stn = fxstn.transform(model, [hp.Dropout()])
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, train, valid, callbacks=[callback])
    runner.fit(epochs)
    return runner


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def tune(epochs: int, callback: Callable) -> Any:
    model, train, valid = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, train, valid, [hp.Dropout()], callbacks=[callback])
    train_model(model, optimizer, train, epochs)
    return tuner


@pytest.mark.parametrize("loop", [run, tune])
def test_a_callback_gets_the_run_after_each_row(loop: Callable) -> None:
    calls: list[tuple[Any, float]] = []
    result = loop(3, lambda one: calls.append((one, one.history.rows[-1]["valid_loss"])))
    assert calls == [(result, loss) for loss in result.history["valid_loss"]]
    assert len(calls) == 3


@pytest.mark.parametrize("loop", [run, tune])
def test_a_trial_gets_each_epoch_and_ends_where_it_is_pruned(loop: Callable) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra fxstn[optuna]")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    histories: list[Any] = []

    def objective(trial: Any) -> float:
        trial.suggest_float("lr", 0.1, 0.2)
        report, name = report_to(trial), trial.number

        def both(one: Any) -> None:
            histories[name:] = [one.history]
            report(one)

        return loop(4, both).history.best()["valid_loss"]

    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(lower=10, n_warmup_steps=2))
    study.optimize(objective, n_trials=1)
    study.pruner = optuna.pruners.NopPruner()
    study.optimize(objective, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    assert [len(history) for history in histories] == [2, 4]
    for trial, history in zip(study.trials, histories, strict=True):
        expected = {int(row["epoch"]): row["valid_loss"] for row in history}
        assert trial.intermediate_values == pytest.approx(expected)


def test_a_trial_is_not_told_what_a_row_does_not_have() -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra fxstn[optuna]")
    trial = optuna.create_study().ask()
    rows = [{"epoch": 1, "valid_loss": 1.0}, {"epoch": 2, "valid_loss": 0.5, "clean_train_loss": 0.25}]
    history = fxstn.History(("fc.dropout",), [])
    report, wrong = report_to(trial, "clean_train_loss"), report_to(trial, "acuracy")
    for row in rows:
        history.rows.append(row)
        report(SimpleNamespace(history=history))
    assert trial.study.get_trials()[0].intermediate_values == {2: 0.25}
    with pytest.raises(KeyError, match="no column 'acuracy'; it has valid_loss"):
        wrong(SimpleNamespace(history=history))


def test_tensorboard_shows_a_loop_of_ones_own(tmp_path: Any) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra fxstn[tensorboard]"
    )
    board = fxstn.TensorBoard(tmp_path)
    tuner = tune(2, board)
    board.close()
    shown = accumulator.EventAccumulator(str(tmp_path)).Reload()
    values = [event.value for event in shown.Scalars("hyperparameter/2.dropout")]
    assert values == pytest.approx(tuner.history["2.dropout"])


def test_no_callback_is_called_for_a_pass_without_a_row() -> None:
    model, train, valid = model_and_data()
    optimizer, calls = torch.optim.SGD(model.parameters(), 0.1), list[Any]()
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, train, valid, [hp.Dropout()], callbacks=[calls.append])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match="the tuner left this step out"):
        train_model(model, optimizer, train, 1)
    assert (calls, len(tuner.history)) == ([], 0)


def test_callbacks_of_a_loop_are_functions() -> None:
    with pytest.raises(TypeError, match=r"callbacks=\[3\] must be a list of functions"):
        tune(0, 3)  # type: ignore[arg-type]


class Unfreeze:
    """Trains a weight from the second epoch on.

    first: whether it is frozen only when `fit` begins.
    """

    def __init__(self, first: bool) -> None:
        self.first, self.weights = first, list[torch.Tensor]()

    def on_fit_start(self, runner: Any) -> None:
        if self.first:
            runner.stn.model[0].weight.requires_grad_(False)

    def __call__(self, runner: Any) -> None:
        weight = runner.stn.model[0].weight.requires_grad_(True)
        self.weights.append(weight.detach().clone())


def run_unfreezing(frozen_first: bool) -> list[torch.Tensor]:
    model, train, valid = model_and_data()
    stn = fxstn.transform(model, [hp.Dropout()])
    stn.model[0].weight.requires_grad_(not frozen_first)
    callback = Unfreeze(not frozen_first)
    fxstn.BilevelRunner(stn, F.cross_entropy, train, valid, callbacks=[callback], progress=False).fit(3)
    return callback.weights


def test_a_weight_without_an_optimizer_is_named_once_it_is_trained():
    with pytest.warns(
        fxstn.RunWarning, match=r"no optimizer steps stn\.model\.0\.weight, .* from epoch 2, step 1 on: freeze"
    ):
        first, *_, last = run_unfreezing(frozen_first=True)
    assert torch.equal(first, last)


def test_the_remedy_of_that_warning_trains_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxstn.RunWarning)
        warnings.filterwarnings("ignore", "valid_loader has training data", fxstn.RunWarning)
        first, *_, last = run_unfreezing(frozen_first=False)
    assert not torch.equal(first, last)
