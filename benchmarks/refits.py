"""Which values of a tuned run should a network be trained anew with on all data, and for how long?

    FXSTN_DATA=DIR python -m benchmarks.refits [--tasks digits kin8nm] [--seeds 3]

Tasks are those of benchmarks/worth, from the usual recipe, one run of the defaults each, and then refits of it on training and
validation data, which differ in the values and in the length. Writes test losses to benchmarks/results/refits.json as it goes,
and goes on where it stopped; `python -m benchmarks.tables` makes the table of docs/guides/runs.md of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from tabulate import tabulate

import fxstn
from benchmarks.overhead import RESULTS
from benchmarks.worth.tasks import TASKS
from benchmarks.worth.training import joined, loader, scores
from fxstn.bilevel.outcome import point_of
from fxstn.hp.hyperparameter import Hyperparameter

FILE = RESULTS / "refits.json"
FAST = ("breast-cancer", "digits", "fine-tuned-cnn", "fine-tuned-resnet", "kin8nm", "fine-tuned-cnn-augmented",
        "removed-word", "fashion-resnet")  # fmt: skip
VALUES = {
    "start": "the start kept",
    "best": "best epoch",
    "mean": "mean up to the best epoch",
    "late": "mean over the second half of these",
    "weighted": "mean over all epochs, by their losses",
    "schedule": "the schedule up to the best epoch",
    "last": "last epoch",
}
LENGTHS = {
    "steps": "best epoch, as many steps",
    "whole": "best epoch, as many epochs as the run",
    "start whole": "the start kept, as many epochs as the run",
}


def mean(numbers: dict[str, Hyperparameter], rows: list[Any], weights: list[float]) -> fxstn.Schedule:
    """Means of λ on the unconstrained scale, as values."""
    result = {}
    for name, number in numbers.items():
        points = [point_of(row[name], number) for row in rows]
        point = sum(w * x for w, x in zip(weights, points, strict=True)) / sum(weights)
        value = number.value_at(point)
        result[name] = [math.floor(value) if number.integer else value]
    return fxstn.Schedule(result)


def by_losses(rows: list[Any]) -> list[float]:
    """Weights of epochs: one whose validation loss is a noise above the lowest counts for 1/e."""
    losses = [row["valid_loss"] for row in rows]
    changes = [abs(after - before) for before, after in pairwise(losses)]
    noise = max(statistics.median(changes or [1.0]), 1e-9)
    return [math.exp(-(loss - min(losses)) / noise) for loss in losses]


def choices(history: fxstn.History, numbers: dict[str, Hyperparameter]) -> dict[str, fxstn.Schedule]:
    best = int(history.best()["epoch"])
    rows, half = history.rows[:best], history.rows[best // 2 : best]
    return {
        "start": fxstn.Schedule({name: [value] for name, value in history.start.items()}),
        "best": history.schedule(best=True).final(),
        "mean": mean(numbers, rows, [1.0] * len(rows)),
        "late": mean(numbers, half, [1.0] * len(half)),
        "weighted": mean(numbers, history.rows, by_losses(history.rows)),
        "schedule": history.schedule(best=True),
        "last": history.schedule().final(),
    }


def cell(name: str, seed: int) -> dict[str, Any]:
    """{kind of refit: (test loss, metric)}, of the tuned run's best epoch too, the epochs, seconds of the CPU."""
    task = TASKS[name]
    train, valid, test = task.sets(seed)
    torch.manual_seed(seed)
    network, own = task.network(), 0.0 if task.decay else task.own_decay
    begun = time.process_time()
    stn = fxstn.transform(network, task.specs(network, "recipe"))
    runner = fxstn.BilevelRunner(
        stn, task.loss, loader(train, task.batch, seed), loader(valid, 500, seed, shuffle=False),
        optimizer=lambda params: task.optimizer(params, weight_decay=own), progress=False,
    )  # fmt: skip
    history = runner.fit(task.epochs)
    best, everything = int(history.best()["epoch"]), joined(train, valid)
    numbers = {number.name: number for number in stn.hparams.hyperparameters}
    schedules = choices(history, numbers)
    shorter = max(1, round(best * len(train) / len(everything)))
    lengths = dict.fromkeys(schedules, best) | {"steps": shorter, "whole": task.epochs, "start whole": task.epochs}
    others = {"steps": "best", "whole": "best", "start whole": "start"}
    results: dict[str, Any] = {"tuned": scores(task, runner.best_model(), test)}
    for kind, epochs in lengths.items():
        torch.manual_seed(100 + seed)
        model = runner.refit(
            loader(everything, task.batch, seed), epochs=epochs, schedule=schedules[others.get(kind, kind)]
        )
        results[kind] = scores(task, model, test)
    return {"scores": results, "best": best, "epochs": task.epochs, "seconds": time.process_time() - begun}


def table(results: dict[str, Any]) -> str:
    """Test losses, means over seeds, and the geometric mean over all cells of the loss to that with the best epoch's values."""
    names = ["tuned", *VALUES, *LENGTHS]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, one in results.items():
        groups.setdefault(key.split()[0], []).append(one["scores"])
    rows = [
        [task, *(f"{statistics.mean(one[name][0] for one in cells):.3f}" for name in names), len(cells)]
        for task, cells in groups.items()
    ]
    ratios = ["loss / that of the best epoch's values"]
    for name in names:
        logs = [math.log(one["scores"][name][0] / one["scores"]["best"][0]) for one in results.values()]
        error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
        ratios.append(f"{math.exp(statistics.mean(logs)):.3f} ± {error:.3f}")
    headers = ["task", "the tuned run", *VALUES.values(), *LENGTHS.values(), "seeds"]
    return tabulate([*rows, [*ratios, ""]], headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(FAST), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed, task in [(seed, task) for seed in range(args.seeds) for task in args.tasks]:
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        if (key := f"{task} {seed}") not in results:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[key] = cell(task, seed)
            FILE.write_text(json.dumps(results, separators=(",", ":")) + "\n")
            print(key, results[key], flush=True)
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
