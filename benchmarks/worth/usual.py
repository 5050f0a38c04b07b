"""The columns of a practitioner who does not search: plain training, the usual recipe, TrivialAugment, AdamCPR."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.worth.cells import Cell, Trial, of_run, outcome, with_refit
from benchmarks.worth.tasks import Task
from benchmarks.worth.training import Limits, Plain, decayed, joined, without


def plain(trial: Trial, name: str = "plain") -> dict[str, Cell]:
    """No regularisation."""
    strengths = without(trial.task)
    run = Plain(trial.task, strengths, trial.seed).run(*trial.task.sets(trial.seed)[:2], trial.limits)
    return {name: with_refit(trial, of_run(trial, run), strengths)}


def recipe(trial: Trial, name: str = "recipe") -> dict[str, Cell]:
    """The strengths of the start, kept. The start "recipe" is the usual recipe."""
    run = Plain(trial.task, trial.strengths, trial.seed).run(*trial.task.sets(trial.seed)[:2], trial.limits)
    return {name: with_refit(trial, of_run(trial, run), trial.strengths)}


def recipe_on_all(trial: Trial) -> dict[str, Cell]:
    """The recipe on training and validation data for the task's epochs: nothing says when to stop."""
    train, valid, _ = trial.task.sets(trial.seed)
    run = Plain(trial.task, trial.strengths, trial.seed).run(joined(train, valid), None, Limits(trial.task.epochs))
    return {"recipe-all": outcome(trial, run.network, run.seconds, epochs=len(run.curve))}


def _each(augment: nn.Module, x: Tensor) -> Tensor:
    """TrivialAugment of every image by itself, in 8 bits, as it is used in a data set."""
    images = (255 * x).round().to(torch.uint8)
    return torch.stack([augment(image) for image in images]) / 255


def trivial_augment(trial: Trial) -> dict[str, Cell]:
    """torchvision's TrivialAugmentWide on the fly, and the recipe's dropout and weight decay beside it."""
    how = {"augment": partial(_each, v2.TrivialAugmentWide())}
    kept = {name: value for name, value in trial.strengths.items() if name in ("dropout", "weight_decay")}
    run = Plain(trial.task, kept, trial.seed, **how).run(*trial.task.sets(trial.seed)[:2], trial.limits)  # type: ignore[arg-type]
    return {"trivial": with_refit(trial, of_run(trial, run), kept, **how)}


def _cpr(steps: int, task: Task, network: nn.Module) -> torch.optim.Optimizer:
    """AdamCPR at the rate of the task's Adam, at 1e-3 in place of SGD.

    steps: of a run. The bound of each weight is what its norm is at the inflection point of its growth, which the package
        looks for at every 200th step in runs of 10⁵; here every 50th part of a run, at most."""
    from pytorch_cpr import AdamCPR

    weights, others = decayed(network)
    given = task.optimizer([torch.zeros(1)])
    rate = 1e-3 if isinstance(given, torch.optim.SGD) else given.param_groups[0]["lr"]
    groups = [{"params": weights, "regularize": True}, {"params": others, "regularize": False}]
    return AdamCPR(groups, lr=rate, kappa_init_method="inflection_point", reg_step_size=max(1, min(200, steps // 50)))


def adam_cpr(trial: Trial) -> dict[str, Cell]:
    """Constrained parameter regularisation (Franke et al. 2024, arXiv 2311.09058) in place of weight decay; else the recipe."""
    task = trial.task
    train, valid, _ = task.sets(trial.seed)
    steps = task.epochs * math.ceil(len(train) / task.batch)
    how = {"optimizer_of": partial(_cpr, steps)}
    run = Plain(task, trial.strengths, trial.seed, **how).run(train, valid, trial.limits)  # type: ignore[arg-type]
    return {"cpr": with_refit(trial, of_run(trial, run), trial.strengths, **how)}
