"""Pictures of the pages that explain: tuned and untuned runs from three starts, the response, and perturbations.

    python -m benchmarks.pictures [--seeds 3]     # minutes on one core; needs scikit-learn and matplotlib

Runs go to benchmarks/results/pictures.json. `python -m benchmarks.tables` draws the pictures and writes the table from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from benchmarks.worth import report
from fxstn import hp

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "pictures.json"
STARTS = {"low": 0.02, "middle": 0.2, "high": 0.6}  # of both dropouts
EPOCHS, BATCH, DECAY = 60, 50, 1e-2
COLORS = {"low": "#1f77b4", "middle": "#2a8a2a", "high": "#c44e00"}


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """400 images to train on, 100 held out, and the other 1,297 to test."""
    from sklearn.datasets import load_digits

    images, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    train, valid = fxstn.hold_out(TensorDataset(images[:500], classes[:500]), 0.2)
    train, valid = (TensorDataset(*(torch.stack(part) for part in zip(*rows, strict=True))) for rows in (train, valid))
    return train, valid, TensorDataset(images[500:], classes[500:])


def network(dropout: float) -> nn.Module:
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


@torch.no_grad()
def loss(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    return F.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    """One epoch."""
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def run(dropout: float, tuned: bool, seed: int) -> dict[str, Any]:
    """Losses by epoch, the two rates by epoch, and the test loss of a refit on all 500 images."""
    torch.manual_seed(seed)
    parts = digits()
    both = TensorDataset(*(torch.cat(pair) for pair in zip(parts[0].tensors, parts[1].tensors, strict=True)))
    loader, everything = (DataLoader(part, BATCH, shuffle=True) for part in (parts[0], both))
    model = network(dropout)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=DECAY)
    specs = [hp.Dropout(), hp.WeightDecay(shared=True)]
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, DataLoader(parts[1], BATCH), specs) if tuned else None
    valid, test, rates = [], [], [[dropout, dropout]]
    for _ in range(EPOCHS):
        train(model, optimizer, loader)
        valid.append(loss(model, parts[1]))
        test.append(loss(model, parts[2]))
        rates.append([v for name, v in tuner.values().items() if name.endswith("dropout")] if tuner else rates[0])
    if tuner:
        final = tuner.refit(everything)
    else:
        final = network(dropout)
        final.load_state_dict(first)
        optimizer = torch.optim.AdamW(final.parameters(), lr=3e-3, weight_decay=DECAY)
        for _ in range(1 + valid.index(min(valid))):
            train(final, optimizer, everything)
    return {"valid": valid, "test": test, "rates": rates, "refit": loss(final, parts[2])}


def ridge(x: Tensor, y: Tensor, decay: float) -> Tensor:
    """The weight (1, 40) with the lowest mean squared error plus ½ decay ‖w‖²."""
    hessian = 2 * x.T @ x / len(x) + decay * torch.eye(40)
    return torch.linalg.solve(hessian, 2 * x.T @ y / len(x)).T


def response() -> dict[str, list[float]]:
    """Ridge regression: validation loss over weight decay, of the exact optimum and of w₀ + Θδ, which was learned at one λ."""
    torch.manual_seed(0)
    x, noise = torch.randn(240, 40), torch.randn(240, 1)
    y = x @ torch.randn(40, 1) / 40**0.5 + noise
    (xt, yt), (xv, yv) = (x[:60], y[:60]), (x[60:], y[60:])
    stn = fxstn.transform(nn.Linear(40, 1, bias=False), [hp.WeightDecay(init=0.2, low=1e-3, high=10.0)],
                          response="structured")  # fmt: skip
    decay = stn.hparams().item()
    with torch.no_grad():
        next(stn.general_parameters()).copy_(ridge(xt, yt, decay))
    optimizer = torch.optim.Adam(stn.response_parameters(), lr=3e-3)
    for _ in range(2000):
        optimizer.zero_grad()
        fxstn.response_loss(stn, F.mse_loss, xt, yt).backward()
        optimizer.step()
    result: dict[str, list[float]] = {"decay": [], "exact": [], "predicted": []}
    for step in torch.linspace(-1.5, 1.5, 41):
        decay = stn.hparams(step.view(1)).item()
        weight = stn.best_response(step.view(1))["weight"].detach()
        result["decay"].append(decay)
        for name, w in (("exact", ridge(xt, yt, decay)), ("predicted", weight)):
            result[name].append(F.mse_loss(F.linear(xv, w), yv).item())
    return result


def table(measured: dict[str, Any]) -> str:
    """Means over seeds of the lowest validation loss, of the test loss at that epoch, and of a refit's test loss."""

    def mean(kind: str, start: str, of: Any) -> str:
        return f"{statistics.mean(of(one) for one in measured[kind][start]):.3f}"

    columns = {
        "validation loss": lambda one: min(one["valid"]),
        "test loss": lambda one: one["test"][one["valid"].index(min(one["valid"]))],
        "test loss of a refit": lambda one: one["refit"],
    }
    cells = [
        [f"dropout {rate}", *(f"{mean('untuned', start, of)} → {mean('tuned', start, of)}" for of in columns.values())]
        for start, rate in STARTS.items()
    ]
    seeds = len(measured["tuned"]["low"])
    headers = [f"start (mean of {seeds} seeds)", *(f"{name}: untuned → tuned" for name in columns)]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def draw(measured: dict[str, Any]) -> None:
    """All pictures, from the runs and from the cells of benchmarks/worth."""
    draw_schedules(measured, ROOT / "docs" / "start" / "schedules.png")
    draw_response(measured["response"], ROOT / "docs" / "concepts" / "response.png")
    draw_perturbation(ROOT / "docs" / "concepts" / "perturbation.png")
    draw_ranks(ROOT / "docs" / "start" / "ranks.png")


def draw_schedules(measured: dict[str, Any], path: Path) -> None:
    """Of seed 0: validation losses, and the rates of the first (—) and second (- -) layer."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for start, color in COLORS.items():
        tuned, untuned = measured["tuned"][start][0], measured["untuned"][start][0]
        left.plot(range(1, EPOCHS + 1), tuned["valid"], color=color, label=f"tuned, from dropout {STARTS[start]}")
        left.plot(range(1, EPOCHS + 1), untuned["valid"], color=color, linestyle=":", label="the start kept")
        for layer, style in enumerate(("-", "--")):
            right.plot([rates[layer] for rates in tuned["rates"]], style, color=color)
    left.set(xlabel="epoch", ylabel="validation loss", yscale="log", ylim=(0.09, 2.5))
    left.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=7.5, ncols=2)
    right.set(xlabel="epoch", ylabel="dropout rate", ylim=(0, None))
    right.set_title("first layer: —, second layer: - -", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_response(lines: dict[str, list[float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.semilogx(lines["decay"], lines["exact"], color="black", label="trained anew at each weight decay")
    axes.semilogx(lines["decay"], lines["predicted"], color=COLORS["high"], label="predicted, from the dot alone")
    middle = len(lines["decay"]) // 2
    axes.plot(lines["decay"][middle], lines["predicted"][middle], "o", color=COLORS["high"])
    axes.set(xlabel="weight decay", ylabel="validation loss")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_perturbation(path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained", sharey=True)
    torch.manual_seed(0)
    for axes, start in zip(panels, (0.1, 0.3, 0.6), strict=True):
        axes.hist(strengths(start).tolist(), bins=38, range=(0, 0.95), color=COLORS["low"])
        axes.axvline(start, color="black")
        axes.set(title=f"λ at dropout {start}", xlabel="rate of an example")
    panels[0].set_ylabel("examples, of 2,000")
    figure.savefig(path, dpi=130)


def draw_ranks(path: Path) -> None:
    """Mean rank and its standard error of each way that trains on all data at last, at equal time, with its time."""
    import matplotlib.pyplot as plt

    lines = report.standings(report.in_the_end(), report.everything(), "time")
    tasks = max(len(one.ranks) for one in lines.values())
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.26 * len(lines)), layout="constrained")
    for place, (entry, one) in enumerate(lines.items()):
        mean, error = statistics.mean(one.ranks), statistics.stdev(one.ranks) / len(one.ranks) ** 0.5
        color = COLORS["high"] if str(entry).startswith("fxstn") else "#555555"
        axes.errorbar(mean, place, xerr=error, fmt="o", color=color, capsize=3)
        axes.text(len(lines) + 0.2, place, f"{statistics.geometric_mean(one.times):.1f} ×", va="center", fontsize=9)
    axes.set_yticks(range(len(lines)), map(str, lines), fontsize=9)
    axes.set(xlim=(1, len(lines) + 1.4), xlabel=f"mean rank of the test loss over {tasks} tasks: 1 is the lowest")
    axes.set_title("time, of plain training", loc="right", fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", color="#e0e0e0")
    figure.savefig(path, dpi=130)


def strengths(start: float) -> Tensor:
    """The rates at which 2,000 examples of a response step draw their dropout."""
    stn = fxstn.transform(network(0.1), [hp.Dropout(init=start, shared=True)])
    return stn.hparams(stn.hparams.sample(2000))[:, 0].detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    measured: dict[str, Any] = {"response": response()}
    for kind in ("untuned", "tuned"):
        measured[kind] = {s: [run(rate, kind == "tuned", seed) for seed in seeds] for s, rate in STARTS.items()}
    FILE.write_text(json.dumps(measured, default=float) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
