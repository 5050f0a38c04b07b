"""The column of this library: one tuned run with the default settings, and a network trained anew with what it found."""

from __future__ import annotations

import time
import warnings

import torch

import fxstn
from benchmarks.worth.cells import Cell, Trial, outcome, refit_of
from benchmarks.worth.training import joined, loader

VALID_BATCH = 500  # of an evaluation


def tuned(trial: Trial) -> dict[str, Cell]:
    """A run of `BilevelRunner`, at its best epoch, and its `refit` on training and validation data."""
    task, limits = trial.task, trial.limits
    train, valid, _ = task.sets(trial.seed)
    torch.manual_seed(trial.seed)
    network = task.network()
    own = 0.0 if task.decay else task.own_decay
    begun = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stn = fxstn.transform(network, task.specs(network, trial.start))
        runner = fxstn.BilevelRunner(
            stn, task.loss, loader(train, task.batch, trial.seed), loader(valid, VALID_BATCH, trial.seed, shuffle=False),
            optimizer=lambda params: task.optimizer(params, weight_decay=own), progress=False,
            callbacks=[fxstn.EarlyStopping(limits.patience)] if limits.patience <= limits.epochs else [],
        )  # fmt: skip
        try:
            runner.fit(limits.epochs)
        except fxstn.DivergedError:
            if not len(runner.history):
                raise
    seconds = time.process_time() - begun
    schedule, best = runner.history.schedule(), runner.history.best()
    told = {"valid": best["valid_loss"], "epochs": len(runner.history), "best_epoch": int(best["epoch"])}
    texts = sorted({str(one.message) for one in warned if issubclass(one.category, fxstn.RunWarning)})
    rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in schedule.values.items()}
    cell = outcome(trial, runner.best_model().eval(), seconds, **told, schedule=rounded, warnings=texts)
    begun = time.process_time()
    again = runner.refit(loader(joined(train, valid), task.batch, trial.seed)).eval()
    return {"ours": cell | {"refit": refit_of(trial, again, time.process_time() - begun)}}
