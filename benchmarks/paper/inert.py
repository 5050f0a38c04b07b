"""A hyperparameter that does nothing: its hypergradient is zero, and whatever moves it is the method's own error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.trials import Task, reading_nothing, trained
from fxstn import hp
from fxstn.tools import data

METHODS = ("stn", "centered", "delta", "default")
STARTS = (0.1, 0.9)


def _sets(seed: int, root: str | None) -> Sequence[TensorDataset]:
    split = data.load("digits", 8, 300, 500, seed, root)
    return split.train, split.valid, split.test


def _mlp(train: TensorDataset) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


TASK = Task(
    _sets,
    _mlp,
    lambda start: [hp.Scalar("nothing", init=start, low=0.0, high=1.0)],
    reading_nothing(F.cross_entropy),
    partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    200,
    64,
    hyper={"warmup_epochs": 5},
)


def run(method: str, start: float, seed: int, epochs: int = TASK.epochs) -> dict[str, Any]:
    """λ after each epoch, {"trajectory": [share of its range, ...]}: an MLP on 300 digits, whose loss does not read λ.

    method: with the settings of the paper, or "default".
    """
    runner, _ = trained(replace(TASK, epochs=epochs), method, start, seed, None)
    values = runner.history.schedule().values["nothing"]
    return {"trajectory": [float(f"{value:.4g}") for value in values]}
