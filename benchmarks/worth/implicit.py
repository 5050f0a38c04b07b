"""One-pass implicit differentiation (Lorraine, Vicol & Duvenaud 2020, arXiv 1911.02590), written from the paper.

dL_V/dλ = -∂L_V/∂w (∂²L_T/∂w∂w)⁻¹ ∂²L_T/∂w∂λ, the inverse by a Neumann series: α Σ_j (I - α H)^j. Every HYPER_EVERY steps of the
weights λ takes one step, on a batch of each set. For L_T to have a derivative in λ, dropout is the relaxation of Gal, Hron &
Kendall (2017, arXiv 1705.07832) and flips are mixed by the same; affine maps are resampled at strength · draw. Holes keep their
start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.worth.cells import Cell, Trial, outcome, with_refit
from benchmarks.worth.searches import MOST
from benchmarks.worth.tasks import Task
from benchmarks.worth.training import Plain, decayed, loader

HYPER_EVERY = 10  # steps of the weights
TERMS = 5  # of the Neumann series
RATE = 0.05  # of λ, by Adam, in units of a logit
TEMPERATURE = 0.1
LEAST_DECAY = 1e-7


def relaxed(rate: Tensor, like: Tensor) -> Tensor:
    """Numbers near 1 with probability `rate`, near 0 else, differentiable in it."""
    noise = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    rate = rate.clamp(1e-6, 1 - 1e-6)
    return ((rate.logit() + noise.logit()) / TEMPERATURE).sigmoid()


class Relaxed(nn.Module):
    """Dropout at a rate that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rate: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - relaxed(self.rate, x)) / (1 - self.rate) if self.training else x


class Strengths:
    """λ, unconstrained: the logit of a share of the range, from 0 to MOST; of weight decay in its logarithm."""

    def __init__(self, names: Mapping[str, float]) -> None:
        self.names = list(names)
        shares = [self._share(name, value) for name, value in names.items()]
        self.logits = torch.tensor(shares).clamp(1e-3, 1 - 1e-3).logit().requires_grad_()

    @staticmethod
    def _share(name: str, value: float) -> float:
        if name == "weight_decay":
            return math.log(max(value, LEAST_DECAY) / LEAST_DECAY) / math.log(MOST[name] / LEAST_DECAY)
        return value / MOST[name.rpartition(".")[2]]

    def values(self) -> dict[str, Tensor]:
        result = {}
        for name, share in zip(self.names, self.logits.sigmoid(), strict=True):
            ratio = math.log(MOST["weight_decay"] / LEAST_DECAY)
            result[name] = (
                LEAST_DECAY * (ratio * share).exp() if name == "weight_decay" else MOST[name.rpartition(".")[2]] * share
            )
        return result


def augmented(x: Tensor, values: Mapping[str, Tensor], fixed: Mapping[str, float], task: Task) -> Tensor:
    """Images at strengths that are tensors, differentiably."""
    n = len(x)
    if "flip" in values:
        mixed = relaxed(values["flip"], x[:, :1, :1, :1])
        x = mixed * x.flip(-1) + (1 - mixed) * x
    if "rotation" in values:
        draw = {name: 2 * torch.rand(n) - 1 for name in ("rotation", "scale", "shear")}
        angle = torch.deg2rad(values["rotation"] * draw["rotation"])
        shear = torch.deg2rad(values["shear"] * draw["shear"]).tan()
        zoom = 1 / (1 + values["scale"] * draw["scale"])
        shift = 2 * values["translate"] * (2 * torch.rand(n, 2) - 1)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        rows = torch.stack([cos, shear * cos - sin, shift[:, 0], sin, shear * sin + cos, shift[:, 1]], 1)
        grid = F.affine_grid(rows.view(n, 2, 3), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    for operation in task.augmentations:
        if "holes" in operation.numbers:
            x = operation.function(x, *(round(fixed[name]) for name in operation.numbers), **operation.defaults)
    return x


class Relaxation:
    """The training of a task with relaxed operations: the loss of a batch at λ."""

    def __init__(self, trial: Trial) -> None:
        self.run = Plain(trial.task, trial.strengths, trial.seed)
        self.task, network = trial.task, self.run.network
        places = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
        self.dropouts = {f"{name}.dropout": Relaxed() for name in places}
        for name in places:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, self.dropouts[f"{name}.dropout"])
        self.fixed = {name: value for name, value in trial.strengths.items() if name in ("holes", "length")}
        others = {name: v for name, v in trial.strengths.items() if name not in ("dropout", *self.fixed)}
        self.strengths = Strengths(dict.fromkeys(self.dropouts, trial.strengths["dropout"]) | others)
        self.weights = decayed(network)[0]
        if self.task.decay:  # the penalty is part of the loss
            self.run.optimizer.param_groups[0]["weight_decay"] = 0.0

    def loss(self, x: Tensor, y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        for name, module in self.dropouts.items():
            module.rate = values[name]
        loss = self.task.loss(self.run.network(augmented(x, values, self.fixed, self.task)), y)
        if "weight_decay" in values:
            loss = loss + 0.5 * values["weight_decay"] * sum(w.square().sum() for w in self.weights)
        return loss

    def hypergradient(self, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], terms: int = TERMS) -> Tensor:
        """-∂L_V/∂w α Σ_j (I - α H)^j ∂²L_T/∂w∂λ, (h,), on a batch of each set; j from 0 to `terms`."""
        network = self.run.network
        weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
        network.eval()
        cost = self.task.loss(network(valid[0]), valid[1])
        vector = list(torch.autograd.grad(cost, weights, allow_unused=True, materialize_grads=True))
        network.train()
        with frozen_statistics(network), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            loss = self.loss(*train, self.strengths.values())
        gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        rate = self.run.optimizer.param_groups[0]["lr"]
        rate = rate if isinstance(self.run.optimizer, torch.optim.SGD) else 10 * rate
        total = [part.clone() for part in vector]
        for _ in range(terms):
            curved = torch.autograd.grad(
                gradient, weights, vector, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            vector = [part - rate * change for part, change in zip(vector, curved, strict=True)]
            total = [sum_ + part for sum_, part in zip(total, vector, strict=True)]
        (mixed,) = torch.autograd.grad(
            gradient, self.strengths.logits, total, allow_unused=True, materialize_grads=True
        )
        return -rate * mixed


class frozen_statistics:  # noqa: N801
    """Batch norms leave their running statistics as they are."""

    def __init__(self, network: nn.Module) -> None:
        self.norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum


def implicit(trial: Trial) -> dict[str, Cell]:
    """One run; the refit takes the mean of λ up to the best epoch."""
    task, limits = trial.task, trial.limits
    train, valid, _ = task.sets(trial.seed)
    training = Relaxation(trial)
    run, strengths = training.run, training.strengths
    optimizer = torch.optim.Adam([strengths.logits], lr=RATE)
    valid_batches, steps, path = endless(loader(valid, task.batch, trial.seed + 1)), 0, []
    begun = time.process_time()
    while len(run.curve) < limits.epochs and len(run.curve) - run.best_epoch < limits.patience:
        run.network.train()
        for x, y in loader(train, task.batch, trial.seed + 100_000 * len(run.curve)):
            run.optimizer.zero_grad()
            with torch.no_grad():
                values = strengths.values()
            training.loss(x, y, values).backward()
            run.optimizer.step()
            steps += 1
            if steps % HYPER_EVERY == 0:
                strengths.logits.grad = training.hypergradient((x, y), next(valid_batches)).nan_to_num()
                optimizer.step()
        run.evaluate(valid)
        path.append({name: value.item() for name, value in strengths.values().items()})
    seconds = time.process_time() - begun
    for module in training.dropouts.values():
        module.rate = torch.zeros(())  # no part of a graph, so that the network can be copied
    told = {"valid": run.best, "epochs": len(run.curve), "best_epoch": run.best_epoch}
    schedule = {name: [float(f"{values[name]:.4g}") for values in path] for name in path[0]}
    cell = outcome(trial, run.best_network(), seconds, **told, schedule=schedule)
    means = {name: sum(v[: run.best_epoch]) / run.best_epoch for name, v in schedule.items()}
    return {"implicit": with_refit(trial, cell, means | training.fixed)}


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches
