"""Is the hypergradient right? Θ's prediction against retraining and against implicit differentiation, on a small network.

    python -m benchmarks.hypergradient [--seeds 4]  # minutes on one core; a table, and docs/results/hypergradient.png

A tanh network 64-16-16-10 on 300 digits, 1,000 to validate; three dropouts at 0.2 and a weight decay of 1e-3 for each layer;
Adam 3e-3. λ is held, so that what happens is the inner problem alone. At some epochs, for each of the six λ:

truth           d L_V / dλ of training from the start to that epoch: central differences over 48 retrainings each way
implicit        -∇L_V · H⁻¹ ∂²L_T/∂w∂λ at the weights of the run, H the Hessian of the mean loss over dropout masks
units           the same with Δw restricted to scaled units: the best that the default response can say
default, paper  Θᵀ∇L_V as the runner learns it, with the default settings and with those of the paper
narrow          the default with perturbations of a quarter of the size
batch           the default with ∇L_V of 128 images

and each but the truth once more with ∇L_V - ∇L_T in the place of ∇L_V ("corrected", the runner's inner_correction). The last
row of the table says how far the truth at an epoch has the direction of that at the last one.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fxstn
from benchmarks.retraining import Problem, truth
from fxstn import hp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "hypergradient.json"
FIGURE = ROOT / "docs" / "results" / "hypergradient.png"
SIZES = (64, 16, 16, 10)
DROPOUT, DECAY, HIGH = 0.2, 1e-3, 0.95
EPOCHS = (5, 10, 20, 40, 80, 160)


def network() -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double()


def specs(scale: float = 1.0) -> list[hp.Spec]:
    return [
        hp.Dropout("input", "1", "3", init=DROPOUT, scale=scale), hp.WeightDecay("*", init=DECAY, scale=scale)
    ]  # fmt: skip


def start() -> Tensor:
    """λ, (6,), unconstrained."""
    return fxstn.transform(network(), specs()).hparams.unconstrained.detach().double()


def constrained(unconstrained: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout rates (..., 3) and weight decays (..., 3) at λ (..., 6): the ranges of hp.Dropout and hp.WeightDecay."""
    rates, decays = HIGH * torch.sigmoid(unconstrained[..., :3]), torch.sigmoid(unconstrained[..., 3:])
    return rates, 1e-7 * (1e6**decays)


def logits(weights: Sequence[Tensor], x: Tensor, unconstrained: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """weights: W, b of each layer, with a leading axis where there are several networks; x and λ likewise."""
    rates, _ = constrained(unconstrained)
    for layer in range(3):
        W, b = weights[2 * layer : 2 * layer + 2]
        if noise is not None:
            p = rates[..., layer, None, None]
            x = x * (noise[layer] >= p) / (1 - p)
        x = x @ W.mT + b.unsqueeze(-2)
        x = torch.tanh(x) if layer < 2 else x
    return x


def decay(weights: Sequence[Tensor], unconstrained: Tensor) -> Tensor:
    """½ Σ λ ‖W‖², for each network."""
    _, decays = constrained(unconstrained)
    return sum(0.5 * decays[..., i] * weights[2 * i].square().flatten(-2).sum(-1) for i in range(3))  # type: ignore[return-value]


PROBLEM = Problem(network, SIZES[:3], logits, decay, torch.float64)


def implicit(weights: list[Tensor], train: TensorDataset, valid: TensorDataset) -> dict[str, Tensor]:
    """ "implicit" and "units", plain and corrected, at the weights of a run."""
    x, y = train.tensors
    shapes, here = [w.shape for w in weights], start()
    flat = torch.cat([w.flatten() for w in weights])

    def split(vector: Tensor) -> list[Tensor]:
        return [v.view(s) for v, s in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]

    draws = {copies: [torch.rand(copies * len(y), n).double() for n in SIZES[:3]] for copies in (8, 64)}

    def training_loss(vector: Tensor, unconstrained: Tensor, copies: int) -> Tensor:
        outputs = logits(split(vector), x.repeat(copies, 1), unconstrained, draws[copies])  # the same masks for every λ
        return F.cross_entropy(outputs, y.repeat(copies)) + decay(split(vector), unconstrained)

    gradient = torch.func.grad(training_loss)
    values, vectors = torch.linalg.eigh(torch.func.hessian(training_loss)(flat, here, 8))
    hessian = (vectors * values.clamp_min(DECAY)) @ vectors.T
    differences = [gradient(flat, here + s, 64) - gradient(flat, here - s, 64) for s in 0.1 * torch.eye(6).double()]
    mixed = torch.stack(differences, 1) / 0.2
    inner = gradient(flat, here, 64)
    outer = torch.func.grad(
        lambda v: F.cross_entropy(logits(split(v), valid.tensors[0], here, None), valid.tensors[1])
    )(flat)
    units = torch.block_diag(*[
        torch.block_diag(*w.reshape(len(w), -1)).T.reshape(w.numel(), len(w)) for w in weights
    ])  # fmt: skip
    responses = {
        "implicit": -torch.linalg.solve(hessian, mixed),
        "units": -units @ torch.linalg.lstsq(units.T @ hessian @ units, units.T @ mixed).solution,
    }
    return {name + kind: theta.T @ g for name, theta in responses.items()
            for kind, g in (("", outer), (", corrected", outer - inner))}  # fmt: skip


def plain_loss(stn: fxstn.SelfTuningNetwork, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(stn.eval()(batch[0]), batch[1])


def pulled_back(stn: fxstn.SelfTuningNetwork, loss: Tensor) -> Tensor:
    """Θᵀ∇ of a loss; leaves no gradient behind."""
    loss.backward()
    result = stn.hypergradient()
    stn.zero_grad()
    return result


def learned(name: str, seed: int, train: TensorDataset, valid: TensorDataset) -> list[dict[str, Tensor]]:
    """Θᵀ∇L_V, plain and corrected, at each of EPOCHS of a run with λ held; for "default" what `implicit` says besides."""
    torch.manual_seed(seed)
    response, hyper = fxstn.ResponseSettings(), fxstn.HyperSettings()
    if name == "paper":
        response = replace(fxstn.PAPER["response"], optimizer=partial(torch.optim.Adam, lr=PROBLEM.rate))
        hyper = replace(fxstn.PAPER["hyper"], tune_scale=False)
    kind = "structured" if name == "paper" else "scaled"
    stn = fxstn.transform(network(), specs(0.25 if name == "narrow" else 1.0), response=kind)
    stn.hparams.double()
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        DataLoader(train, PROBLEM.batch, shuffle=True),
        DataLoader(valid, len(valid)),
        progress=False,
        optimizer=partial(torch.optim.Adam, lr=PROBLEM.rate),
        response=response,
        hyper=replace(hyper, warmup_epochs=EPOCHS[-1]),
    )
    rows = []
    for epoch in EPOCHS:
        runner.fit(epoch)
        many = [t.repeat(64, *[1] * (t.dim() - 1)) for t in train.tensors]
        inner = pulled_back(stn, fxstn.general_loss(stn.train(), F.cross_entropy, *many))
        found = {name: pulled_back(stn, plain_loss(stn, valid.tensors))}
        if name == "default":
            found["batch"] = pulled_back(stn, plain_loss(stn, valid[:128]))
        row = found | {f"{key}, corrected": value - inner for key, value in found.items()}
        if name == "default":
            row |= implicit([p.detach() for p in stn.general_parameters()], train, valid)
        rows.append(row)
    return rows


def measure(seeds: int) -> dict[str, Any]:
    """{"truth": [epoch][λ], estimator: [seed][epoch][λ]}."""
    train, valid = PROBLEM.sets()
    torch.manual_seed(0)
    found: dict[str, Any] = {"truth": truth(PROBLEM, start(), 48, EPOCHS).mean(1).tolist()}
    for seed in tqdm(range(seeds)):
        for name in ("default", "narrow", "paper"):
            rows = learned(name, seed, train, valid)
            for estimator in rows[0]:
                found.setdefault(estimator, []).append([row[estimator].tolist() for row in rows])
    return found


def compared(found: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """{estimator: (cosine with the truth, size over the truth's), each (seeds, epochs)}."""
    true = torch.tensor(found["truth"])
    estimates = {name: torch.tensor(values) for name, values in found.items() if name != "truth"}
    return {
        name: (F.cosine_similarity(v, true, dim=-1), v.norm(dim=-1) / true.norm(dim=-1))
        for name, v in estimates.items()
    }


def table(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(
                f"{c:+.2f} ({s:.2g})"
                for c, s in zip(cosine.mean(0).tolist(), size.median(0).values.tolist(), strict=True)
            ),
        ]
        for name, (cosine, size) in compared(found).items()
    ]
    true = torch.tensor(found["truth"])
    last = F.cosine_similarity(true, true[-1:], dim=-1).tolist()
    rows.append(["truth, with that at the last epoch", *(f"{c:+.2f}" for c in last)])
    return tabulate(rows, ["hypergradient", *(f"epoch {e}" for e in EPOCHS)], tablefmt="github", disable_numparse=True)


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    colors = {"implicit": "k", "units": "C2", "default": "C3", "narrow": "C1", "batch": "C4", "paper": "C0"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, (cosine, size) in compared(found).items():
        base, _, corrected = name.partition(", ")
        if corrected and base not in ("default", "implicit"):
            continue
        style = {"color": colors[base], "ls": ":" if corrected else "-", "label": name}
        left.plot(EPOCHS, cosine.mean(0), **style)
        middle.plot(EPOCHS, size.median(0).values, **style)
    left.set(title="cosine with the effect of retraining", ylim=(-0.4, 1.05))
    middle.set(yscale="log", title="size, over that of retraining")
    middle.axhline(1, color="0.7", zorder=0)
    left.legend(fontsize=8)
    for axis in (left, middle):
        axis.set(xscale="log", xlabel="epoch", xticks=EPOCHS, xticklabels=EPOCHS)
        axis.minorticks_off()
    at = EPOCHS.index(20)
    bars = {"truth": torch.tensor(found["truth"][at])} | {
        name: torch.tensor(found[name]).mean(0)[at] for name in ("units", "default", "paper")
    }
    for i, (name, values) in enumerate(bars.items()):
        right.bar(torch.arange(6) + 0.2 * (i - 1.5), values, 0.2, color=colors.get(name, "0.6"), label=name)
    right.set(title=f"d L_V / dλ at epoch {EPOCHS[at]}", xticks=range(6))
    right.set_xticklabels([f"{kind} {i}" for kind in ("dropout", "decay") for i in (1, 2, 3)], rotation=30)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each method")
    parser.add_argument("--report", action="store_true", help="print and draw what is there, and run nothing")
    args = parser.parse_args()
    if not args.report:
        RESULTS.write_text(json.dumps(measure(args.seeds), separators=(",", ":")) + "\n")
    found = json.loads(RESULTS.read_text())
    print(table(found))
    draw(found, FIGURE)


if __name__ == "__main__":
    main()
