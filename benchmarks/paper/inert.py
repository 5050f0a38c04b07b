"""A hyperparameter that does nothing: its hypergradient is zero, and whatever moves it is the method's own error."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import data, hp
from fxstn.cli import loader

METHODS = ("stn", "centered", "delta", "default")
STARTS = (0.1, 0.9)
EPOCHS = 200


def run(method: str, start: float, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """λ after each epoch, {"trajectory": [share of its range, ...]}: an MLP on 300 digits, whose loss does not read λ.

    method: with the settings of the paper, or "default".
    """
    split = data.load("digits", 8, 300, 500, seed, None)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    nothing = [hp.Scalar("nothing", init=start, low=0.0, high=1.0)]
    sgd = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    if method == "default":
        stn, settings = fxstn.transform(model, nothing), {}
    else:
        stn = fxstn.transform(model, nothing, method=method, response="structured")
        settings = fxstn.PAPER | {"response_optimizer": sgd, "warmup_epochs": 5}
    runner = fxstn.BilevelRunner(
        stn, F.cross_entropy, loader(split.train, 64, seed), loader(split.valid, 128, seed + 1),
        optimizer=sgd, progress=False, **settings,
    )  # fmt: skip
    values = runner.fit(epochs).schedule().values["nothing"]
    return {"trajectory": [float(f"{value:.4g}") for value in values]}
