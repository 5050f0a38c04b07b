"""The hypergradient of a small network with batch norms against retraining, for each way to draw ε.

    python -m benchmarks.batchnorm [--rate 0.2 0.6] [--seeds 6]      # minutes on one core; prints tables

64-32-32-10 with batch norms and ReLU on 300 digits, 1,000 to validate; three dropouts at one rate, held; Adam 3e-3. Truth is
d L_V / dλ of training from the start to an epoch, L_V normalised by the validation batch as in the hyper step: central
differences over 32 retrainings each way that share starts, orders and noise. Against it the hyper step's Θᵀ∇L_V and,
"corrected", Θᵀ(∇L_V - ∇L_T). Entries, in thousandths: mean (standard error) for each dropout, and the cosine of the mean.
Results: benchmarks/results/batchnorm.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from benchmarks.overhead import RESULTS
from benchmarks.retraining import Problem, truth
from fxstn import hp

PATH = RESULTS / "batchnorm.json"
SIZES, HIGH = (64, 32, 32, 10), 0.95
EPOCHS = (10, 40, 80)
RETRAININGS = 32
BATCHES = 200  # of ∇L_T


def network() -> nn.Sequential:
    blocks = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(SIZES[:-1])]
    return nn.Sequential(*itertools.chain.from_iterable(blocks), nn.Linear(*SIZES[-2:]))


def specs(rate: float) -> list[hp.Spec]:
    return [hp.Dropout("input", "2", "5", init=rate, high=HIGH)]


def logits(weights: Sequence[Tensor], x: Tensor, unconstrained: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """Batch norms normalise by the batch."""
    rates = HIGH * torch.sigmoid(unconstrained)
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


PROBLEM = Problem(network, SIZES[:3], logits, lambda weights, unconstrained: 0.0, torch.float32)


def hypergradients(stn: fxstn.SelfTuningNetwork, train: TensorDataset, valid: TensorDataset) -> Tensor:
    """Θᵀ∇L_V and the corrected one, (2, 3); leaves gradients and running statistics as they were."""
    kept = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    loss = fxstn.hyper_loss(stn.train(), F.cross_entropy, *valid.tensors, entropy_weight=0.0, perturb="off")
    (outer,) = torch.autograd.grad(loss, stn.hparams.unconstrained)
    for _ in range(BATCHES):
        chosen = torch.randperm(len(train))[: PROBLEM.batch]
        fxstn.general_loss(stn, F.cross_entropy, *train[chosen]).backward()
    inner = stn.hypergradient() / BATCHES
    stn.zero_grad()
    for name, buffer in stn.model.named_buffers():
        buffer.copy_(kept[name])
    return torch.stack([outer, outer - inner])


def learned(perturb: str, rate: float, seeds: int, train: TensorDataset, valid: TensorDataset) -> Tensor:
    """Hypergradients of runs with λ held, (2, len(EPOCHS), seeds, 3)."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        stn = fxstn.transform(network(), specs(rate))
        runner = fxstn.BilevelRunner(
            stn,
            F.cross_entropy,
            DataLoader(train, PROBLEM.batch, shuffle=True),
            DataLoader(valid, len(valid)),
            optimizer=partial(torch.optim.Adam, lr=PROBLEM.rate),
            hyper=fxstn.HyperSettings(warmup_epochs=EPOCHS[-1]),
            response=fxstn.ResponseSettings(perturb=perturb),
            progress=False,
            checkpoints=fxstn.CheckpointSettings(rollbacks=0),
        )
        for epoch in EPOCHS:
            runner.fit(epoch)
            found.append(hypergradients(stn, train, valid))
    return torch.stack(found).view(seeds, len(EPOCHS), 2, 3).permute(2, 1, 0, 3)


def measure(rate: float, seeds: int) -> dict[str, Any]:
    """{"truth", "example", "example, corrected", ...: [epoch][sample][dropout]}."""
    torch.manual_seed(0)
    here = fxstn.transform(network(), specs(rate)).hparams.unconstrained.detach()
    found = {"truth": truth(PROBLEM, here, RETRAININGS, EPOCHS)}
    for perturb in ("example", "batch"):
        plain, corrected = learned(perturb, rate, seeds, *PROBLEM.sets())
        found |= {perturb: plain, f"{perturb}, corrected": corrected}
    return {
        name: [[[round(v, 6) for v in row] for row in rows] for rows in values.tolist()]
        for name, values in found.items()
    }


def table(found: dict[str, Any]) -> str:
    """Of one rate. A line for each way and epoch: means (standard errors) for each dropout, and the cosine of the mean."""
    true = torch.tensor(found["truth"]).mean(1)
    rows = []
    for name, values in found.items():
        for epoch, samples, expected in zip(EPOCHS, torch.tensor(values), true, strict=True):
            means, errors = 1e3 * samples.mean(0), 1e3 * samples.std(0) / len(samples) ** 0.5
            numbers = [f"{m:+.1f} ({e:.1f})" for m, e in zip(means.tolist(), errors.tolist(), strict=True)]
            rows.append([name, epoch, *numbers, f"{F.cosine_similarity(means, expected, dim=0).item():+.2f}"])
    headers = ["ε per", "epoch", "input", "first hidden", "second hidden", "cosine with the truth"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.2, 0.6], help="of the three dropouts, held")
    parser.add_argument("--seeds", type=int, default=6, help="runs of each way")
    parser.add_argument("--report", action="store_true", help="print what is there, and run nothing")
    args = parser.parse_args()
    for rate in () if args.report else args.rate:
        found = json.loads(PATH.read_text()) if PATH.exists() else {}
        PATH.write_text(json.dumps(found | {str(rate): measure(rate, args.seeds)}, separators=(",", ":")) + "\n")
    for rate, found in json.loads(PATH.read_text()).items():
        print(f"dropouts at {rate}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
