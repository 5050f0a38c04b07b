"""The weight of each class in the loss, tuned: two Gaussian clouds, 5 % of training but half of validation from one.

The loss function takes `hparams` and reads two `hp.Scalar`; `fxstn.transform` and the runner do the rest. In the hyper step and
in evaluation hparams is None, and the loss the plain one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp


def loss_fn(output, target, hparams=None):
    losses = F.cross_entropy(output, target, reduction="none")
    if hparams is not None:
        weights = torch.stack([hparams["common"], hparams["rare"]], 1)  # (batch, 2): one value per example
        losses = losses * weights.gather(1, target[:, None])[:, 0]
    return losses.mean()


def clouds(examples: int, rare: float, batch: int) -> DataLoader:
    """Ten numbers around -0.4 or 0.4: the best classifier is right in 90 % of balanced examples."""
    target = (torch.rand(examples) < rare).long()
    inputs = torch.randn(examples, 10) + 0.8 * target[:, None] - 0.4
    return DataLoader(TensorDataset(inputs, target), batch, shuffle=True)


def run(seed: int, epochs: int, tune: bool) -> list[float]:
    """[balanced test accuracy, weight of the common class, of the rare one]"""
    torch.manual_seed(seed)
    train, valid, test = clouds(400, 0.05, 50), clouds(400, 0.5, 100), clouds(2000, 0.5, 1000)
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))
    stn = fxstn.transform(net, [hp.Scalar(name, 1.0, low=0.05, high=20.0, log=True) for name in ("common", "rare")])
    warmup = 0 if tune else epochs
    runner = fxstn.BilevelRunner(
        stn,
        loss_fn,
        train,
        valid,
        metrics={"accuracy": fxstn.accuracy},
        hyper=fxstn.HyperSettings(warmup_epochs=warmup),
    )
    runner.fit(epochs)
    return [runner.evaluate(test)["accuracy"], *stn.hparams.values().values()]


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of each run")
    parser.add_argument("--seeds", type=int, default=5, help="each chooses data, weights and order")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args(arguments)
    found = {
        name: [run(seed, args.epochs, tune) for seed in range(args.seeds)]
        for name, tune in (("tuned", True), ("weights 1", False))
    }
    means = [[name, *(statistics.mean(column) for column in zip(*rows, strict=True))] for name, rows in found.items()]
    headers = [f"mean of {args.seeds} seeds", "test accuracy", "weight of the common class", "of the rare class"]
    print(tabulate(means, headers, floatfmt=".3f"))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
