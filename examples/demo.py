"""Tune resnet18 on scikit-learn's digits, against the same network trained untuned for as many epochs; then refit it.

Both runs start from the same weights, with one dropout rate wherever `hparams=None` puts a dropout and weight decay 1e-4. The
tuned run moves these seven numbers while it trains, with the runner's default settings; the other keeps them. The refit is the
network trained anew at the values of the tuned run, from the same weights, on training and validation images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import resnet18

import fxstn
from fxstn import hp
from fxstn.tools import data

COLUMNS = ["valid loss", "valid accuracy", "test loss", "test accuracy", "seconds"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def prepare(seed: int, args: argparse.Namespace):
    """(network, training, validation and test loaders), the same for both runs of a seed."""
    torch.manual_seed(seed)
    split = data.load("digits", train=args.train_size, valid=500, seed=seed)
    stn = fxstn.transform(
        resnet18(num_classes=split.classes), [hp.Dropout(init=args.start), hp.WeightDecay(shared=True, init=1e-4)]
    )
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(split.train, 50, shuffle=True, generator=order)
    valid = DataLoader(split.valid, 125, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return stn, train, valid, DataLoader(split.test, 400)


def evaluate(model: torch.nn.Module, loader: DataLoader) -> tuple[float, float]:
    """(loss, accuracy) in eval mode."""
    model.eval()
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in loader]
    output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
    return F.cross_entropy(output, target).item(), fxstn.accuracy(output, target)


def say(seed: int, name: str, result: dict[str, float]) -> None:
    """A line of a run that is over, also where there is no terminal for its bar."""
    print(f"seed {seed}, {name}: {', '.join(f'{key} {value:.3g}' for key, value in result.items())}", flush=True)


def untuned(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Plain training at the starting hyperparameters, evaluated in the same way: the runner on a schedule that never moves."""
    stn, train, valid, test = prepare(seed, args)
    still = fxstn.Schedule({name: [value] for name, value in stn.hparams.values().items()})
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, train, valid, optimizer=sgd, schedule=still)
    start = time.process_time()
    runner.fit(args.epochs)
    seconds = time.process_time() - start
    best = runner.best_model()
    return dict(zip(COLUMNS, (*evaluate(best, valid), *evaluate(best, test), seconds), strict=True))


def tuned(seed: int, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """The same training with λ tuned, and the refit; writes history, report, schedule plot and exported weights."""
    stn, train, valid, test = prepare(seed, args)
    out = Path(args.out) / f"seed-{seed}"
    runner = fxstn.BilevelRunner(
        stn,
        F.cross_entropy,
        train,
        valid,
        optimizer=sgd,
        metrics={"accuracy": fxstn.accuracy},
        checkpoints=fxstn.CheckpointSettings(out_dir=out),
    )
    start = time.process_time()
    history = runner.fit(args.epochs)
    seconds = time.process_time() - start
    best = runner.best_model()
    say(seed, "tuned", {"valid loss": history.best()["valid_loss"], "seconds": seconds})
    start = time.process_time()
    everything = ConcatDataset([train.dataset, valid.dataset])
    order = torch.Generator().manual_seed(seed)
    model = runner.refit(DataLoader(everything, 50, shuffle=True, generator=order))
    again = dict(zip(COLUMNS[2:], (*evaluate(model, test), time.process_time() - start), strict=True))
    say(seed, "refit", again)
    torch.save(model.state_dict(), out / "weights.pt")
    history.plot(out / "schedules.png")
    runner.report(out / "report.html", title=f"resnet18 on digits, seed {seed}")
    result = dict(zip(COLUMNS, (*evaluate(best, valid), *evaluate(best, test), seconds), strict=True))
    return result | history.outcome().values, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind; the table shows their mean")
    parser.add_argument("--train-size", type=int, default=300, help="training images")
    parser.add_argument(
        "--start", type=float, default=0.5, help="dropout rate that both begin with (torch's own default)"
    )
    parser.add_argument("--out", default="out/demo", help="folder for the results, emptied of earlier ones")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"untuned": [], "tuned": [], "refit": []}
    print(f"untuned, tuned and refitted, {args.seeds} times; a line follows each run", flush=True)
    for seed in range(args.seeds):
        shutil.rmtree(Path(args.out) / f"seed-{seed}", ignore_errors=True)
        results["untuned"].append(untuned(seed, args))
        say(seed, "untuned", results["untuned"][-1])
        for name, result in zip(("tuned", "refit"), tuned(seed, args), strict=True):
            results[name].append(result)
    means = {
        name: [statistics.mean(run[c] for run in runs) if c in runs[0] else "" for c in COLUMNS]
        for name, runs in results.items()
    }
    print(
        f"\nresnet18, {args.train_size} training images, {args.epochs} epochs, mean of {args.seeds} seeds, best epoch:"
    )
    print(tabulate([[name, *values] for name, values in means.items()], ["", *COLUMNS], floatfmt=".3f"))
    found = [name for name in results["tuned"][0] if name not in COLUMNS]
    print(
        tabulate(
            [[n, *(run[n] for run in results["tuned"])] for n in found], ["found", *range(args.seeds)], floatfmt=".3g"
        )
    )
    Path(args.out, "results.json").write_text(json.dumps(results, indent=1) + "\n")
    files = "report.html, history.csv, schedules.png, weights.pt, best.pt, last.pt"
    print(f"written to {args.out}: results.json, and per seed {files}")


if __name__ == "__main__":
    main()
