"""Which cheaper schedule loses nothing: final validation loss on two real tasks, several seeds.

    python -m benchmarks.schedules [--task mlp conv] [--seeds 3] [--data-root DIR]

"mlp": 784 × 3 - 600 - 600 - 10 on 5,000 MNIST digits, three dropout rates, 40 epochs. "conv": three convolutions with batch
norm on 5,000 FashionMNIST images, four dropout rates, 20 epochs. 2,000 other images validate. Writes
benchmarks/results/schedules.json as it goes, and goes on where it stopped; then prints the table.
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
from torch import nn
from tqdm import tqdm

import fxstn
from fxstn import data, hp
from fxstn.cli import loader

RESULTS = Path(__file__).parent / "results" / "schedules.json"
TASKS = {"mlp": ("mnist", 40), "conv": ("fashion-mnist", 20)}
FULL: dict[str, Any] = {"response_fraction": 1.0, "response_every": 1}
CHEAP: dict[str, Any] = {"response_fraction": 0.5, "response_every": 4, "momentum": 0.0}
SCHEDULES: dict[str, dict[str, Any]] = {
    "untuned": {"untuned": True},
    "every step, whole batch": FULL,
    "every 2nd step, 1/4": {"response_fraction": 0.25, "response_every": 2},
    "every 4th step, 1/2": {"response_fraction": 0.5, "response_every": 4},
    "every 4th step, 1/2, no momentum": CHEAP,
    "every 5th step, 1/2, no momentum": {"response_fraction": 0.5, "response_every": 5, "momentum": 0.0},
    "every 4th step, 1/3, no momentum": CHEAP | {"response_fraction": 1 / 3},
}
NORMS: dict[str, dict[str, Any]] = {
    f"{schedule}; {statistics}, ε per {perturb}": settings | {"statistics": statistics, "perturb": perturb}
    for schedule, settings in (("every step, whole batch", FULL), ("every 4th step, 1/2", CHEAP | {"momentum": 0.9}))
    for statistics in ("batch", "running")
    for perturb in (("example", "batch") if schedule.startswith("every step") else ("example",))
}
SETTINGS = {"mlp": SCHEDULES, "conv": {"untuned": {"untuned": True}} | NORMS}


def network(task: str) -> tuple[nn.Module, list[hp.Spec]]:
    """A plain network and what is tuned of it."""
    if task == "mlp":
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 784, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 10)
        )
        return model, [hp.Dropout("input", "2", "4", init=0.05)]

    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))

    model = nn.Sequential(block(3, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(64 * 9, 10))
    return model, [hp.Dropout("input", "0", "1", "2", init=0.05)]


def run(task: str, settings: dict[str, Any], seed: int, root: str | None) -> dict[str, Any]:
    """Best and last validation loss, and what was found."""
    name, epochs = TASKS[task]
    split = data.load(name, 28, 5000, 2000, seed, root)
    torch.manual_seed(seed)
    model, hparams = network(task)
    settings = dict(settings)
    untuned, statistics = settings.pop("untuned", False), settings.pop("statistics", "batch")
    momentum = settings.pop("momentum", 0.9)
    rate = 5e-2 if momentum else 0.25
    runner = fxstn.BilevelRunner(
        fxstn.transform(model, hparams, statistics=statistics), F.cross_entropy,
        loader(split.train, 128, seed), loader(split.valid, 128, seed + 1),
        response_optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=momentum),
        hyper_optimizer=lambda p: torch.optim.RMSprop(p, lr=3e-2),
        warmup_epochs=epochs if untuned else 2, progress=False, **(settings or CHEAP),
    )  # fmt: skip
    diverged = None
    try:
        history = runner.fit(epochs)
    except fxstn.DivergedError as error:
        history, diverged = runner.history, str(error).partition("(")[0]
    return {
        "best": history.best()["valid_loss"], "last": history.rows[-1]["valid_loss"], "diverged": diverged,
        "found": {name: round(value, 3) for name, value in runner.stn.hparams.values().items()},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds, Markdown."""
    rows = []
    for key, runs in sorted(results.items(), key=lambda item: list(TASKS).index(item[0].split(":")[0])):
        task, label = key.split(": ", 1)
        best = [run["best"] for run in runs]
        spread = statistics.stdev(best) if len(best) > 1 else 0.0
        rates = [statistics.mean(values) for values in zip(*(run["found"].values() for run in runs), strict=True)]
        found = " / ".join(f"{rate:.2f}" for rate in rates)
        lost = sum(bool(run["diverged"]) for run in runs)
        rows.append([task, label, f"{statistics.mean(best):.3f} ± {spread:.3f}", found, len(runs), lost or ""])
    headers = ["task", "response step", "best validation loss", "rates found (mean)", "seeds", "diverged"]
    return tabulate(rows, headers, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), help="which tasks")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--data-root", help="where torchvision's data lies (default: the variable FXSTN_DATA)")
    args = parser.parse_args()
    todo = [(seed, t, label) for seed in range(args.seeds) for t in args.task for label in SETTINGS[t]]
    for seed, task, label in (bar := tqdm(todo, disable=None)):
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if len(results.get(f"{task}: {label}", [])) > seed:
            continue
        bar.set_description(f"{task}: {label}, seed {seed}")
        row = run(task, SETTINGS[task][label], seed, args.data_root)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results.setdefault(f"{task}: {label}", []).append(row)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
