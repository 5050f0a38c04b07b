"""What tuning is worth, without a hypergradient: small networks trained again at λ ± a step, all at once on one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxstn.tools import data

Weights = Sequence[Tensor]
Noise = Sequence[Tensor] | None


@dataclass(frozen=True)
class Problem:
    """A classifier of three layers, with a dropout before each, on 300 digits of 64 numbers; 1,000 digits to validate.

    network: makes one. logits(weights, x, λ, noise): of many at once; all have a leading axis, noise, uniform on [0, 1), for
    each dropout, None: no dropout. penalty(weights, λ): (networks,), of the training loss.
    """

    network: Callable[[], nn.Module]
    sizes: Sequence[int]  # the inputs of the layers
    logits: Callable[[Weights, Tensor, Tensor, Noise], Tensor]
    penalty: Callable[[Weights, Tensor], Tensor | float]
    dtype: torch.dtype
    batch: int = 50
    rate: float = 3e-3  # of Adam

    def sets(self) -> tuple[TensorDataset, TensorDataset]:
        split = data.load("digits", 8, 300, 1000, seed=0)
        pixels, labels = zip(*(part.tensors for part in (split.train, split.valid)), strict=True)
        train, valid = (
            TensorDataset(x[:, 0].flatten(1).to(self.dtype), y) for x, y in zip(pixels, labels, strict=True)
        )
        return train, valid


def losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each network, (networks,)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(len(logits), -1).mean(1)


def retrained(problem: Problem, lambdas: Tensor, copies: int, epochs: Sequence[int]) -> Tensor:
    """L_V after each of `epochs` from scratch, (len(lambdas), copies, len(epochs)); λ's share starts, orders and noise."""
    (train, valid), many = problem.sets(), len(lambdas)
    (x, y), (xv, yv) = train.tensors, valid.tensors
    starts = [[p.detach() for p in problem.network().parameters()] for _ in range(copies)]
    weights = [torch.stack(ws).repeat(many, *[1] * ws[0].dim()).requires_grad_() for ws in zip(*starts, strict=True)]
    each = lambdas.repeat_interleave(copies, 0)
    optimizer, found = torch.optim.Adam(weights, lr=problem.rate), []
    for epoch in range(1, epochs[-1] + 1):
        order = torch.stack([torch.randperm(len(y)) for _ in range(copies)])
        for chosen in order.split(problem.batch, 1):
            noise = [torch.rand(copies, chosen.shape[1], n).to(problem.dtype).repeat(many, 1, 1) for n in problem.sizes]
            logits = problem.logits(weights, x[chosen].repeat(many, 1, 1), each, noise)
            (losses(logits, y[chosen].repeat(many, 1)) + problem.penalty(weights, each)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch in epochs:
            with torch.no_grad():
                logits = problem.logits(weights, xv.expand(len(each), *xv.shape), each, None)
                found.append(losses(logits, yv.repeat(len(each), 1)).view(many, copies))
    return torch.stack(found, -1)


def truth(problem: Problem, here: Tensor, copies: int, epochs: Sequence[int], step: float = 0.5) -> Tensor:
    """d L_V / dλ of having trained at another λ from the start, (len(epochs), copies, len(here)): central differences."""
    steps = step * torch.eye(len(here), dtype=here.dtype)
    above, below = retrained(problem, here + torch.cat([steps, -steps]), copies, epochs).chunk(2)
    return ((above - below) / (2 * step)).permute(2, 1, 0)
