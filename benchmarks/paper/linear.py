"""Linear regression and linear networks, where the best response is known exactly: λ found against the optimum (figures 3, 4).

Three inner problems on standardised data, n examples, L_V the mean squared error on others:

l2          mean squared error + ½ λ ‖w‖²                    w*(λ) = (2/n XᵀX + λ I)⁻¹ 2/n Xᵀy
dropout     mean squared error with input dropout p           the same with 2 p/(1−p) diag(mean x²) in the place of λ I
network     five hidden layers W₆⋯W₁ x, + λ ‖∂y/∂x‖²          the same with 2λ I: the Jacobian of the whole is w = W₆⋯W₁

"excess" is how far L_V(w*(λ)) at the final λ is above its minimum, relatively: what the λ found costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fxstn
from benchmarks.ridge import golden_section, load_arrays, thinned
from fxstn import hp

SETS = ("bostonHousing", "concrete", "energy", "kin8nm", "naval-propulsion-plant", "power-plant",
        "protein-tertiary-structure", "wine-quality-red", "yacht")  # fmt: skip
METHODS = ("stn", "centered", "delta")
EXAMPLES, HIDDEN = 1000, 5  # at most so many examples to train with, and as many to validate
BATCH = 1024  # drawn with replacement: each example has several ε in a step
PASS = 10  # hyper steps in a pass over the loader, after which λ is written down


@dataclass(frozen=True)
class Kind:
    """specs(start, σ): what is tuned. matrix(X, λ): what is added to 2/n XᵀX. starts: initial λ. grid: where optima may lie."""

    specs: Callable[[float, float], list[hp.Spec]]
    matrix: Callable[[Tensor, float], Tensor]
    starts: tuple[float, ...]
    grid: Tensor
    depth: int = 0
    loss: Callable[..., Tensor] = F.mse_loss


def _identity(X: Tensor, strength: float) -> Tensor:
    return strength * torch.eye(X.shape[1], dtype=X.dtype)


KINDS = {
    "l2": Kind(
        lambda start, scale: [hp.WeightDecay("*", init=start, low=0, high=math.inf, scale=scale)],
        _identity, (1e-2, 1e-1, 1e0), torch.logspace(-9, 3, 500, dtype=torch.float64),
    ),
    "dropout": Kind(
        lambda start, scale: [hp.Dropout("input", init=start, scale=scale)],
        lambda X, p: 2 * p / (1 - p) * X.square().mean(0).diag(), (0.05, 0.3, 0.7),
        torch.linspace(0, 0.95, 400, dtype=torch.float64),
    ),
    "network": Kind(
        lambda start, scale: [hp.JacobianNorm(init=start, low=0, high=math.inf, scale=scale)],
        lambda X, strength: _identity(X, 2 * strength), (1e-2, 1e-1, 1e0),
        torch.logspace(-9, 2, 500, dtype=torch.float64), HIDDEN,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Standardised by the training part; float64. X: (n, d), y: (n,)."""

    X: Tensor
    y: Tensor
    X_valid: Tensor
    y_valid: Tensor

    def best_loss(self, kind: Kind, strength: float) -> float:
        """L_V(w*(λ))."""
        gram = 2 / len(self.X) * self.X.T @ self.X
        w = torch.linalg.lstsq(gram + kind.matrix(self.X, strength), 2 / len(self.X) * self.X.T @ self.y).solution
        return (self.X_valid @ w - self.y_valid).square().mean().item()

    def optimum(self, kind: Kind) -> tuple[float, float]:
        """λ* and L_V(w*(λ*)): the best of a grid, refined between its neighbours; an end of the grid where that is best."""
        grid = kind.grid.tolist()
        best = min(range(len(grid)), key=lambda i: self.best_loss(kind, grid[i]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        refined = golden_section(partial(self.best_loss, kind), low, high, width=1e-4 * (high - low))
        strength = min((grid[best], refined), key=partial(self.best_loss, kind))
        return strength, self.best_loss(kind, strength)


def problem(name: str, root: str | None, seed: int) -> Problem:
    """60 % of a set to train, 40 % to validate, at most EXAMPLES of each, shuffled by seed."""
    X, y = (torch.as_tensor(values, dtype=torch.float64) for values in load_arrays(name, root))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    cut = int(0.6 * len(y))
    train, valid = order[:cut][:EXAMPLES], order[cut:][:EXAMPLES]
    X, y = ((values - values[train].mean(0)) / values[train].std(0).clamp_min(1e-8) for values in (X, y))
    return Problem(X[train], y[train], X[valid], y[valid])


def _model(features: int, depth: int) -> nn.Module:
    """A linear map to one output, over `depth` hidden linear layers of as many units as there are features."""
    sizes = [features] * (depth + 1) + [1]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    for layer in layers[:-1]:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


def _loader(X: Tensor, y: Tensor, batches: int, seed: int) -> DataLoader[Any]:
    """Passes of so many batches, whatever the size of the set."""
    data, order = TensorDataset(X.float(), y.float()[:, None]), torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data, replacement=True, num_samples=BATCH * batches, generator=order)
    return DataLoader(data, sampler=BatchSampler(sampler, BATCH, drop_last=True), batch_size=None)


def run(
    name: str, kind_name: str, method: str, start: float, scale: float, seed: int, root: str | None, hyper_steps: int
) -> dict[str, Any]:
    """One run: "trajectory" [[hyper step, λ], ...], "final" (mean of the last tenth, geometric for coefficients), "optimum",
    "loss" and "least": L_V(w*) there, "excess".

    T_train = 10, T_valid = 1 and σ held, as in the paper; structured response; Adam (w 1e-2, Θ 5e-3, λ 1e-1), with rates that
    fall to a tenth in the last half.
    """
    kind, data, epochs = KINDS[kind_name], problem(name, root, seed), hyper_steps // PASS
    torch.manual_seed(seed)
    stn = fxstn.transform(
        _model(data.X.shape[1], kind.depth), kind.specs(start, scale), method=method, response="structured"
    )
    names = ("optimizer", "response.optimizer", "hyper.optimizer")
    weights, response, hyper = (partial(torch.optim.Adam, lr=rate) for rate in (1e-2, 5e-3, 1e-1))

    def falling(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, max(0.1, 2 - 2 * epoch / epochs)))

    runner = fxstn.BilevelRunner(
        stn,
        kind.loss,
        _loader(data.X, data.y, 10 * PASS, seed),
        [(data.X_valid.float(), data.y_valid.float()[:, None])],
        optimizer=weights,
        schedulers=dict.fromkeys(names, falling),
        progress=False,
        response=replace(fxstn.PAPER["response"], optimizer=response),
        hyper=replace(fxstn.PAPER["hyper"], optimizer=hyper, train_steps=10, tune_scale=False),
        checkpoints=fxstn.CheckpointSettings(rollbacks=0),
    )
    trajectory = runner.fit(epochs).schedule().values
    (values,) = trajectory.values()
    tail = torch.tensor(values[-max(1, epochs // 10) :], dtype=torch.float64)
    final = tail.mean().item() if kind_name == "dropout" else tail.log().mean().exp().item()
    best, least = data.optimum(kind)
    loss = data.best_loss(kind, final)
    points = [[PASS * i, value] for i, value in thinned(values, 60)]
    return {
        "final": final,
        "optimum": best,
        "loss": loss,
        "least": least,
        "excess": loss / least - 1,
        "trajectory": points,
    }
