"""Means of the validation loss and of metrics over batches, those of all processes together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.faults import RunWarning
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.tally import count, one_number
from fxstn.misfit import fitting


def totals(
    problem: BilevelProblem,
    batches: Iterable[tuple[Any, Any]],
    where: str,
    metrics: dict[str, Callable[[Any, Any], Any]],
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[str, float], tuple]:
    """This process's sums of "valid_loss" and metrics over examples, and their number, "examples"; its first batch, or ()."""
    sums: dict[str, float] = dict.fromkeys(("examples", "valid_loss", *metrics), 0.0)
    evaluation = problem.evaluation()
    first: tuple = ()
    for inputs, target in batches:
        first = first or (inputs, target)
        with precision(), fitting((inputs, target), where, problem):
            loss, output = evaluation(inputs, target)
        weight = count(inputs, target)
        values = {name: one_number(f(output, target), f"metrics[{name!r}]") for name, f in metrics.items()}
        for name, value in {"valid_loss": loss.item(), **values}.items():
            sums[name] += value * weight
        sums["examples"] += weight
    return sums, first


def means(sums: dict[str, float], name: str, device: torch.device) -> dict[str, float]:
    """Over the examples of all processes. Raises ValueError where there is none; name: of the loader."""
    sums = distributed.total(sums, device)
    if not (examples := sums.pop("examples")):
        raise ValueError(f"{name} is empty: it yielded no batch")
    return {key: total / examples for key, total in sums.items()}


def clean_train_loss(training: Callable[[], dict[str, float]], device: torch.device) -> float:
    """The mean of the validation loss over training batches; NaN, and a warning, where `training()`, its sums here, fails.

    A loss function that was given for another kind of batch may raise anything; lack of memory is raised.
    """
    sums: dict[str, float] = {}
    fault = ""
    try:
        sums = training()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fault = f": {type(error).__name__}: {error}"
    if not distributed.any_of(bool(fault), device):
        return means(sums, "train_loader", device)["valid_loss"]
    if not distributed.rank():
        text = f"λ is not limited for an epoch, for the validation loss of training batches cannot be had{fault}; "
        warnings.warn(text + "give a valid_loss_fn that takes them, too", RunWarning, stacklevel=6)
    return math.nan
