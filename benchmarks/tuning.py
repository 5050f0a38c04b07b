"""Does tuning in one run pay? Tasks × methods × starts × seeds: best validation loss against time, and the test loss there.

    python -m benchmarks.tuning [--tasks mnist-mlp diabetes-mlp] [--methods ...] [--seeds 3] [--trials 30] [--data-root DIR]
    python -m benchmarks.tuning --report

Methods: "untuned" trains at the start; "random" trains from scratch at random strengths, trial after trial; "stn", "centered"
and "delta" have the paper's settings, "default" the runner's own. A task's optimiser of the weights serves them all. Writes
benchmarks/results/tuning-TASK.json as it goes and goes on where it stopped; the report reads these files alone: it compares
methods with random search at the time that "default" took, and with the best of all its trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import fxstn
from benchmarks.ridge import load_arrays
from fxstn import data, hp
from fxstn.cli import loader

ROOT = Path(__file__).parent
STARTS = {"low": 0.05, "middle": 0.3, "high": 0.7}  # of dropout; as shares of the range in log space for weight decay
PAPER: dict[str, Any] = {"response_fraction": 1.0, "response_every": 1}
METHODS = ("untuned", "default", "delta", "centered", "stn", "random")


@dataclass(frozen=True)
class Task:
    """sets(seed, data root): training, validation and test set. specs(start): what is tuned, from STARTS[start]."""

    sets: Callable[[int, str | None], Sequence[TensorDataset]]
    model: Callable[[TensorDataset], nn.Module]
    specs: Callable[[float], list[hp.Spec]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    epochs: int
    batch: int = 128


def _images(name: str, size: int, train: int, valid: int, seed: int, root: str | None) -> Sequence[TensorDataset]:
    split = data.load(name, size, train, valid, seed, root)
    return split.train, split.valid, split.test


def _grey(name: str, train: int, valid: int, seed: int, root: str | None) -> Sequence[TensorDataset]:
    sets = _images(name, 28, train, valid, seed, root)
    return [TensorDataset(part.tensors[0][:, :1].contiguous(), part.tensors[1]) for part in sets]


def _regression(name: str, seed: int, root: str | None) -> Sequence[TensorDataset]:
    """60 % to train, 20 % to validate, 20 % to test, standardised by the training part."""
    X, y = (torch.as_tensor(values, dtype=torch.float32) for values in load_arrays(name, root))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([int(0.6 * len(y)), int(0.8 * len(y))])
    X, y = ((values - values[parts[0]].mean(0)) / values[parts[0]].std(0) for values in (X, y))
    return [TensorDataset(X[part], y[part, None]) for part in parts]


def _mlp(train: TensorDataset, widths: Sequence[int], outputs: int) -> nn.Module:
    sizes = [train.tensors[0][0].numel(), *widths]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))


class SimpleCNN(nn.Sequential):
    """The paper's network for FashionMNIST: two 5×5 convolutions with 16 and 32 filters, pools, two linear layers."""

    def __init__(self) -> None:
        blocks = [
            layer
            for inputs, filters in ((1, 16), (16, 32))
            for layer in (nn.Conv2d(inputs, filters, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.0))
        ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(1568, 1568), nn.ReLU(), nn.Dropout(0.0), nn.Linear(1568, 10))


def _small_resnet18() -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images: a 3×3 convolution of stride 1 and no pooling."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def _weight_decay(start: float) -> hp.Spec:
    return hp.WeightDecay("*", shared=True, init=1e-6 * 1e5**start, low=1e-7, high=1e-1)


TASKS = {
    "mnist-mlp": Task(
        partial(_grey, "mnist", 5000, 2000), partial(_mlp, widths=(600, 600), outputs=10),
        lambda start: [hp.Dropout("input", "2", "4", init=start)],
        F.cross_entropy, partial(torch.optim.Adam, lr=1e-3), 40,
    ),
    "diabetes-mlp": Task(
        partial(_regression, "diabetes"), partial(_mlp, widths=(64, 64), outputs=1),
        lambda start: [hp.Dropout("input", "2", "4", init=start), _weight_decay(start)],
        F.mse_loss, partial(torch.optim.Adam, lr=1e-3), 100, 32,
    ),
    "fashion-cnn": Task(
        partial(_grey, "fashion-mnist", 5000, 2000), lambda train: SimpleCNN(),
        lambda start: [
            hp.Dropout("input", "3", "7", "11", init=start),
            hp.Cutout("input", init={"holes": 5 * start, "length": 2 + 22 * start}),
        ],
        F.cross_entropy, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 40,
    ),
    "digits-resnet18": Task(
        partial(_images, "digits", 8, 500, 500), lambda train: _small_resnet18(),
        lambda start: [hp.Dropout(init=start), _weight_decay(start)],
        F.cross_entropy, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 40, 64,
    ),
}  # fmt: skip


def train(task: Task, method: str, start: str, seed: int, root: str | None, trial: int = 0) -> dict[str, Any]:
    """One run: {"curve": [[seconds, best validation loss so far], ...], "valid", "test", "epoch", "found"}."""
    train_set, valid_set, test_set = task.sets(seed, root)
    torch.manual_seed(1000 * trial + seed)
    model = task.model(train_set)
    kind = method if method in ("centered", "stn") else "delta"
    stn = fxstn.transform(model, task.specs(STARTS[start]), method=kind)
    settings: dict[str, Any] = {}
    if method in ("untuned", "random"):
        settings = {"warmup_epochs": task.epochs, "response_every": 10**9}
    elif method != "default":
        settings = PAPER | {"response_optimizer": task.optimizer}
    if method == "random":  # uniform in each range, in log space where the range is
        stn.hparams.unconstrained.data.copy_(torch.rand(len(stn.hparams)).clamp(1e-3, 1 - 1e-3).logit())
    runner = fxstn.BilevelRunner(
        stn, task.loss, loader(train_set, task.batch, seed), loader(valid_set, task.batch, seed + 1),
        optimizer=task.optimizer, progress=False, **settings,
    )  # fmt: skip
    diverged = False
    try:
        runner.fit(task.epochs)
    except fxstn.DivergedError:
        diverged = True
    best = runner.history.best()
    seconds, least, curve = 0.0, float("inf"), []
    for row in runner.history.rows:
        seconds, least = seconds + row["seconds"], min(least, row["valid_loss"])
        curve.append([round(seconds, 2), round(least, 5)])
    model.load_state_dict(runner.best["model"])  # type: ignore[index]
    with torch.no_grad():
        test = task.loss(model.eval()(test_set.tensors[0]), test_set.tensors[1]).item()
    found = {name: round(best[name], 6) for name in stn.hparams.names}
    return {"curve": curve, "valid": best["valid_loss"], "test": test, "epoch": best["epoch"], "found": found,
            "diverged": diverged}  # fmt: skip


# The report


def seconds_of(cell: dict[str, Any]) -> float:
    return cell["curve"][-1][0]


def best_within(trials: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The best of the trials that a search starts within a time; the first in any case. All are run to their end."""
    starts = itertools.accumulate(map(seconds_of, trials), initial=0.0)
    begun = [trial for trial, start in zip(trials, starts, strict=False) if start < seconds]
    return min(begun or trials[:1], key=lambda trial: trial["valid"])


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def table(results: dict[str, Any]) -> str:
    """A line for each method and start: means ± standard deviations over seeds."""
    rows = []

    def line(label: str, start: str, cells: Sequence[dict[str, Any]], seconds: float) -> None:
        lost = sum(cell["diverged"] for cell in cells)
        losses = [_mean([cell[part] for cell in cells]) for part in ("valid", "test")]
        rows.append([label, start, *losses, f"{seconds:.0f}", len(cells), lost or ""])

    def mean_seconds(cells: Sequence[dict[str, Any]]) -> float:
        return statistics.mean(map(seconds_of, cells)) if cells else 0.0

    for method in METHODS[:-1]:
        for start in STARTS:
            cells = [cell for key, cell in results.items() if key.startswith(f"{method} {start} ")]
            if cells:
                line(method, start, cells, mean_seconds(cells))
    searches = [trials for key, trials in results.items() if key.startswith("random")]
    if searches:
        time = mean_seconds([cell for key, cell in results.items() if key.startswith("default")])
        line("random search, same time", "", [best_within(trials, time) for trials in searches], time)
        total = statistics.mean(sum(map(seconds_of, trials)) for trials in searches)
        line("random search, all trials", "", [best_within(trials, float("inf")) for trials in searches], total)
    headers = ["method", "start", "best validation loss", "test loss there", "seconds", "seeds", "diverged"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def path_of(task: str) -> Path:
    return ROOT / "results" / f"tuning-{task}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="which tasks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="which methods")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), help="which starts")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--trials", type=int, default=30, help="of random search, for each seed")
    parser.add_argument("--data-root", help="where torchvision's data lies (default: the variable FXSTN_DATA)")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and run nothing")
    args = parser.parse_args()
    todo = [] if args.report else [
        (seed, task, method, start, trial)
        for task in args.tasks for seed in range(args.seeds) for method in args.methods
        for start in (args.starts if method != "random" else ["middle"])
        for trial in range(args.trials if method == "random" else 1)
    ]  # fmt: skip
    for seed, task, method, start, trial in (bar := tqdm(todo, disable=None)):
        path, key = path_of(task), f"{method} {start} {seed}"
        results = json.loads(path.read_text()) if path.exists() else {}
        if len(results.get(key, [])) > trial if method == "random" else key in results:
            continue
        bar.set_description(f"{task}: {method}, {start}, seed {seed}")
        cell = train(TASKS[task], method, start, seed, args.data_root, trial)
        if method == "random":
            results.setdefault(key, []).append(cell)
        else:
            results[key] = cell
        path.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    for task in args.tasks:
        if path_of(task).exists():
            print(f"\n{task}\n\n{table(json.loads(path_of(task).read_text()))}")


if __name__ == "__main__":
    main()
