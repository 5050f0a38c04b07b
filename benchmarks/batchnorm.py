"""The hypergradient of a small network with batch norms against retraining, for each way to draw ε.

    python -m benchmarks.batchnorm [--rate 0.2] [--seeds 6]      # minutes on one core; prints a table

64-32-32-10 with batch norms and ReLU on 300 digits, 1,000 to validate; three dropouts at one rate, held; Adam 3e-3. Truth is
d L_V / dλ of training from the start to an epoch, L_V normalised by the validation batch as in the hyper step: central
differences over 32 retrainings each way that share starts, orders and noise. Against it the hyper step's Θᵀ∇L_V and,
"corrected", Θᵀ(∇L_V - ∇L_T). Entries, in thousandths: mean (standard error) for each dropout, and the cosine of the mean.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import data, hp

SIZES, BATCH, LEARNING_RATE, HIGH = (64, 32, 32, 10), 50, 3e-3, 0.95
EPOCHS = (5, 10, 20, 40, 80)
STEP, RETRAININGS = 0.5, 32  # of the central differences, in unconstrained units
BATCHES = 200  # of ∇L_T


def network() -> nn.Sequential:
    blocks = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(SIZES[:-1])]
    return nn.Sequential(*itertools.chain.from_iterable(blocks), nn.Linear(*SIZES[-2:]))


def specs(rate: float) -> list[hp.Spec]:
    return [hp.Dropout("input", "2", "5", init=rate, high=HIGH)]


def forward(weights: Sequence[Tensor], x: Tensor, rates: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """Logits of many networks at once: weights, x and rates have a leading axis; batch norms normalise by the batch."""
    for layer in range(3):
        W, *rest = weights[3 * layer : 3 * layer + 3]
        if noise is not None:
            p = rates[:, layer, None, None]
            x = x * (noise[layer] >= p) / (1 - p)
        x = x @ W.mT
        if layer == 2:
            return x + rest[0].unsqueeze(-2)
        mean, var = x.mean(-2, keepdim=True), x.var(-2, keepdim=True, correction=0)
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * rest[0].unsqueeze(-2) + rest[1].unsqueeze(-2))
    return x


def retrained(lambdas: Tensor, train: TensorDataset, valid: TensorDataset) -> Tensor:
    """L_V after EPOCHS of training from scratch, (len(lambdas), RETRAININGS, len(EPOCHS))."""
    (x, y), (xv, yv), many = train.tensors, valid.tensors, len(lambdas)
    starts = [[p.detach() for p in network().parameters()] for _ in range(RETRAININGS)]
    weights = [torch.stack(ws).repeat(many, *[1] * ws[0].dim()).requires_grad_() for ws in zip(*starts, strict=True)]
    rates = HIGH * torch.sigmoid(lambdas.repeat_interleave(RETRAININGS, 0))
    optimizer, found = torch.optim.Adam(weights, lr=LEARNING_RATE), []

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(len(rates), -1).mean(1)

    for epoch in range(1, EPOCHS[-1] + 1):
        order = torch.stack([torch.randperm(len(y)) for _ in range(RETRAININGS)])
        for chosen in order.split(BATCH, 1):
            noise = [torch.rand(RETRAININGS, chosen.shape[1], n).repeat(many, 1, 1) for n in SIZES[:3]]
            losses(
                forward(weights, x[chosen].repeat(many, 1, 1), rates, noise), y[chosen].repeat(many, 1)
            ).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch in EPOCHS:
            with torch.no_grad():
                logits = forward(weights, xv.expand(len(rates), *xv.shape), rates, None)
                found.append(losses(logits, yv.repeat(len(rates), 1)).view(many, RETRAININGS))
    return torch.stack(found, -1)


def truth(rate: float, train: TensorDataset, valid: TensorDataset) -> Tensor:
    """d L_V / dλ, (len(EPOCHS), RETRAININGS, 3)."""
    here = fxstn.transform(network(), specs(rate)).hparams.unconstrained.detach()
    steps = STEP * torch.eye(3)
    found = retrained(here + torch.cat([steps, -steps]), train, valid)
    return ((found[:3] - found[3:]) / (2 * STEP)).permute(2, 1, 0)


def hypergradients(stn: fxstn.SelfTuningNetwork, train: TensorDataset, valid: TensorDataset) -> Tensor:
    """Θᵀ∇L_V and the corrected one, (2, 3); leaves gradients and running statistics as they were."""
    kept = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    loss = fxstn.hyper_loss(stn.train(), F.cross_entropy, *valid.tensors, entropy_weight=0.0, perturb="none")
    (outer,) = torch.autograd.grad(loss, stn.hparams.unconstrained)
    for _ in range(BATCHES):
        chosen = torch.randperm(len(train))[:BATCH]
        fxstn.general_loss(stn, F.cross_entropy, *train[chosen]).backward()
    inner = stn.hypergradient() / BATCHES
    stn.zero_grad()
    for name, buffer in stn.model.named_buffers():
        buffer.copy_(kept[name])
    return torch.stack([outer, outer - inner])


def learned(
    perturb: str, every: int, rate: float, seeds: int, train: TensorDataset, valid: TensorDataset
) -> dict[int, Tensor]:
    """{epoch: hypergradients of runs with λ held, (seeds, 2, 3)}."""
    found: dict[int, list[Tensor]] = {epoch: [] for epoch in EPOCHS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        stn = fxstn.transform(network(), specs(rate))
        runner = fxstn.BilevelRunner(
            stn, F.cross_entropy, DataLoader(train, BATCH, shuffle=True), DataLoader(valid, len(valid)),
            optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE), warmup_epochs=EPOCHS[-1], perturb=perturb,
            response_every=every, progress=False, rollbacks=0,
        )  # fmt: skip
        for epoch in EPOCHS:
            runner.fit(epoch)
            found[epoch].append(hypergradients(stn, train, valid))
    return {epoch: torch.stack(values) for epoch, values in found.items()}


def shown(samples: Tensor, true: Tensor) -> list[str]:
    """Means and standard errors of (samples, 3), and the cosine."""
    means, errors = 1e3 * samples.mean(0), 1e3 * samples.std(0) / len(samples) ** 0.5
    numbers = [f"{m:+.1f} ({e:.1f})" for m, e in zip(means.tolist(), errors.tolist(), strict=True)]
    return [*numbers, f"{F.cosine_similarity(means, true, dim=0).item():+.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.2, help="of the three dropouts, held")
    parser.add_argument("--seeds", type=int, default=6, help="runs of each way")
    args = parser.parse_args()
    split = data.load("digits", 8, 300, 1000, seed=0)
    train, valid = (
        TensorDataset(part.tensors[0][:, 0].flatten(1), part.tensors[1]) for part in (split.train, split.valid)
    )
    torch.manual_seed(0)
    true = truth(args.rate, train, valid)
    means = true.mean(1)
    rows = [["truth", epoch, *shown(true[i], means[i])] for i, epoch in enumerate(EPOCHS)]
    for perturb, every in itertools.product(("example", "batch"), (4, 1)):
        found = learned(perturb, every, args.rate, args.seeds, train, valid)
        for kind, label in enumerate(("", ", corrected")):
            name = f"{perturb}, every {every}{label}"
            rows += [[name, epoch, *shown(found[epoch][:, kind], means[i])] for i, epoch in enumerate(EPOCHS)]
    print(
        tabulate(
            rows, ["ε per", "epoch", "input", "first", "second", "cosine"], tablefmt="github", disable_numparse=True
        )
    )


if __name__ == "__main__":
    main()
