"""A training run of a task by a method, and searches whose trials are such runs; for the tuning and the paper benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.optim import SettlingAdam
from fxstn.tools.data import loader

SEARCHES = ("random", "random-halving", "tpe", "tpe-halving")
PAPERS = ("delta", "centered", "stn")
ABLATIONS: dict[str, dict[str, Any]] = {  # what each changes of the default
    "unlimited": {"hyper": fxstn.HyperSettings(optimizer=partial(SettlingAdam, limits=False))},
    "uncertain": {"hyper": fxstn.HyperSettings(optimizer=partial(SettlingAdam, lr=0.2, certainty=None, limits=False))},
    "constant-rate": {"hyper": fxstn.HyperSettings(optimizer=partial(torch.optim.Adam, lr=6e-2))},
    "every-step": {"response": fxstn.ResponseSettings(every=1)},
    "uncorrected": {"hyper": fxstn.HyperSettings(inner_correction=0.0)},
    "unwidened": {"response": fxstn.ResponseSettings(widening=1.0)},
}
RUNS = ("untuned", "default", *ABLATIONS, *PAPERS)
WORST = 1e6  # the loss that a search is told of a run that diverged
EDGE = 1e-3  # searches stay this share of its range away from the ends of a strength


def reading_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss that is offered hyperparameters and reads none of them, as controls need it."""

    def result(output: Tensor, target: Tensor, hparams: object = None) -> Tensor:
        return loss(output, target)

    return result


@dataclass(frozen=True)
class Task:
    """sets(seed, data root): training, validation and test set. specs(start): what is tuned, from a dropout of `start`.

    settings: of the runner, by every method; paper: by those of the paper (PAPERS), beside `fxstn.PAPER`, whose
    `HyperSettings` have `hyper` in place of their own.
    """

    sets: Callable[[int, str | None], Sequence[TensorDataset]]
    model: Callable[[TensorDataset], nn.Module]
    specs: Callable[[float], list[hp.Spec]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    epochs: int
    batch: int = 128
    settings: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)


def still(stn: fxstn.SelfTuningNetwork) -> fxstn.Schedule:
    """The values that the hyperparameters have, throughout: training without a step of Θ or λ."""
    return fxstn.Schedule({name: [value] for name, value in stn.hparams.values().items()})


def prepared(
    task: Task, method: str, start: float, seed: int, root: str | None, **more: Any
) -> tuple[fxstn.BilevelRunner, TensorDataset]:
    """A runner of one method, and the test set. Weights and order of the data depend on the torch seed and `seed`.

    more: further settings of the runner."""
    train_set, valid_set, test_set = task.sets(seed, root)
    model, specs = task.model(train_set), task.specs(start)
    if method in PAPERS:
        hyper = replace(fxstn.PAPER["hyper"], **task.hyper)
        settings = {"response": replace(fxstn.PAPER["response"], optimizer=task.optimizer), "hyper": hyper} | task.paper
        stn = fxstn.transform(model, specs, method=method, response="structured")
    else:
        stn, settings = fxstn.transform(model, specs), ABLATIONS.get(method, {})
    if method in ("untuned", *SEARCHES):
        settings = {"schedule": still(stn)}
    runner = fxstn.BilevelRunner(
        stn, task.loss, loader(train_set, task.batch, seed), loader(valid_set, task.batch, seed + 1),
        **{"optimizer": task.optimizer, "progress": False, **task.settings, **settings, **more},
    )  # fmt: skip
    return runner, test_set


def outcome(task: Task, runner: fxstn.BilevelRunner, test_set: TensorDataset, diverged: bool) -> dict[str, Any]:
    """{"curve": [[seconds, best validation loss so far], ...], "valid", "test", "epoch", "found", "diverged"}."""
    if not len(runner.history):  # a loss was not finite in the first epoch
        return {"curve": [], "valid": float("inf"), "test": float("inf"), "epoch": 0, "found": {}, "diverged": True}
    best, rows = runner.history.best(), runner.history.rows
    seconds = itertools.accumulate(row["seconds"] for row in rows)
    least = itertools.accumulate((row["valid_loss"] for row in rows), min)
    model = runner.best_model().eval()
    with torch.no_grad():
        test = task.loss(model(test_set.tensors[0]), test_set.tensors[1]).item()
    curve = [[round(time, 2), round(loss, 5)] for time, loss in zip(seconds, least, strict=True)]
    found = {name: float(f"{best[name]:.4g}") for name in runner.stn.hparams.names}
    return {"curve": curve, "valid": best["valid_loss"], "test": test, "epoch": best["epoch"], "found": found,
            "diverged": diverged}  # fmt: skip


def trained(
    task: Task, method: str, start: float, seed: int, root: str | None, minutes: float | None = None, **more: Any
) -> tuple[fxstn.BilevelRunner, dict[str, Any]]:
    """One run of a method that needs one, of at most so many minutes, and its outcome."""
    torch.manual_seed(seed)
    runner, test_set = prepared(task, method, start, seed, root, **more)
    try:
        runner.fit(task.epochs, minutes)
        diverged = False
    except fxstn.DivergedError:
        diverged = True
    return runner, outcome(task, runner, test_set, diverged)


def search(
    task: Task, method: str, seed: int, root: str | None, earlier: Sequence[dict[str, Any]], storage: Any = None
) -> dict[str, Any]:
    """The next trial of a search that has made the `earlier` ones: a run from scratch, with its "shares" of the ranges.

    storage: Optuna's, which keeps the study "METHOD SEED"; None: in memory. Earlier trials that it lacks are entered, and a
    trial that was cut short has failed.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, task.epochs // 9), reduction_factor=3)
    sampler_seed = 10_000 * seed + len(earlier)
    study = optuna.create_study(
        storage=storage, study_name=f"{method} {seed}", load_if_exists=True,
        sampler=(optuna.samplers.TPESampler if method.startswith("tpe") else optuna.samplers.RandomSampler)(seed=sampler_seed),
        pruner=halving if method.endswith("halving") else optuna.pruners.NopPruner(),
    )  # fmt: skip
    torch.manual_seed(1000 * (len(earlier) + 1) + seed)
    runner, test_set = prepared(task, method, 0.3, seed, root)
    space = runner.stn.hparams
    ranges = dict.fromkeys(space.names, optuna.distributions.FloatDistribution(EDGE, 1 - EDGE))
    for cut in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut.number, state=TrialState.FAIL)
    known = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    for cell in earlier[len(known) :]:
        done = optuna.trial.create_trial(
            params=cell["shares"], distributions=ranges, value=min(cell["valid"], WORST),
            state=TrialState.PRUNED if cell["pruned"] else TrialState.COMPLETE,
            intermediate_values={i + 1: loss for i, (_, loss) in enumerate(cell["curve"])}, system_attrs=cell["frontends"],
        )  # fmt: skip
        study.add_trial(done)
    trial = study.ask(ranges)
    with torch.no_grad():
        space.unconstrained.copy_(torch.tensor([trial.params[name] for name in space.names]).logit())
    runner.schedule = still(runner.stn)
    diverged = pruned = False
    for epoch in range(1, task.epochs + 1):
        try:
            runner.fit(epoch)
        except fxstn.DivergedError:
            diverged = True
            break
        trial.report(runner.history.best()["valid_loss"], epoch)
        if pruned := trial.should_prune():
            break
    result = outcome(task, runner, test_set, diverged)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)  # its value is that of the last epoch
    else:
        study.tell(trial, min(result["valid"], WORST))
    frontends = study.trials[trial.number].system_attrs  # what the pruner noted: a search can go on without the storage
    return result | {"shares": trial.params, "pruned": pruned, "frontends": frontends}
