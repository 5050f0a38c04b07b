"""Which values of a tuned run should a network be trained anew with on all data, and for how long?

    FXSTN_DATA=DIR python -m benchmarks.refits [recorded | lengths | averages] [--tasks digits kin8nm] [--seeds 3]

Tasks are those of benchmarks/worth. "recorded": networks trained anew by plain torch, at the values that its runs recorded.
"lengths" and "averages": one run of the defaults each from the usual recipe, and then refits of it on training and validation
data, which differ in the values and in the length, at their last weights; or in how far back the averages of the weights reach.
Writes test losses to benchmarks/results/refits-KIND.json as it goes, and goes on where it stopped. `python -m
benchmarks.tables` makes the tables of docs/guides/values.md of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader

import fxstn
from benchmarks.overhead import RESULTS
from benchmarks.worth.cells import Trial, key_of, read, trained_anew
from benchmarks.worth.tasks import TASKS
from benchmarks.worth.training import Limits, joined, loader, scores
from fxstn.bilevel.outcome import point_of, value_and_spread
from fxstn.hp.hyperparameter import Hyperparameter

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
RECORDED = {kind: VALUES[kind] for kind in ("best", "late")} | {
    "found": "that, or the best epoch's where it is weaker",
    "schedule": VALUES["schedule"],
}
GROUPS = {  # {(reading of benchmarks/worth, start): in words}
    ("patience", "recipe"): "from the usual recipe, until the validation loss stops falling",
    ("time", "high"): "from a start that is too strong, in a short run",
}
SHARES = (0.02, 0.05, 0.1, 0.2)  # of the steps, which averages reach back over
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


def tuned_run(name: str, seed: int) -> tuple[fxstn.BilevelRunner, DataLoader]:
    """A run of the defaults from the usual recipe, and a loader of training and validation data."""
    task = TASKS[name]
    train, valid, _ = task.sets(seed)
    torch.manual_seed(seed)
    network, own = task.network(), 0.0 if task.decay else task.own_decay
    stn = fxstn.transform(network, task.specs(network, "recipe"))
    runner = fxstn.BilevelRunner(
        stn, task.loss, loader(train, task.batch, seed), loader(valid, 500, seed, shuffle=False),
        optimizer=lambda params: task.optimizer(params, weight_decay=own), progress=False,
    )  # fmt: skip
    runner.fit(task.epochs)
    return runner, loader(joined(train, valid), task.batch, seed)


def cell(name: str, seed: int) -> dict[str, Any]:
    """{kind of refit: (test loss, metric)}, of the tuned run's best epoch too, the epochs, seconds of the CPU."""
    begun, task = time.process_time(), TASKS[name]
    train, _, test = task.sets(seed)
    runner, everything = tuned_run(name, seed)
    best = int(runner.history.best()["epoch"])
    numbers = {number.name: number for number in runner.stn.hparams.hyperparameters}
    schedules = choices(runner.history, numbers)
    shorter = max(1, round(best * len(train) / len(everything.dataset)))
    lengths = dict.fromkeys(schedules, best) | {"steps": shorter, "whole": task.epochs, "start whole": task.epochs}
    others = {"steps": "best", "whole": "best", "start whole": "start"}
    results: dict[str, Any] = {"tuned": scores(task, runner.best_model(), test)}
    for kind, epochs in lengths.items():
        torch.manual_seed(100 + seed)
        model = runner.refit(everything, epochs=epochs, schedule=schedules[others.get(kind, kind)], ema=None)
        results[kind] = scores(task, model, test)
    return {"scores": results, "best": best, "epochs": task.epochs, "seconds": time.process_time() - begun}


def recorded_cell(name: str, seed: int) -> dict[str, Any]:
    """{"READING START": {kind of values: test loss}}, of plain training for as many epochs as the best one of a run had."""
    return {f"{reading} {start}": _recorded(name, seed, reading, start) for reading, start in GROUPS}


def _recorded(name: str, seed: int, reading: str, start: str) -> dict[str, float]:
    task, run = TASKS[name], read(name)[key_of(reading, "ours", start, seed)]
    network = task.network()
    numbers = {n.name: n for n in fxstn.transform(network, task.specs(network, start)).hparams.hyperparameters}
    columns, best = run["schedule"], run["best_epoch"] or run["epochs"]
    rows = [{name: column[epoch] for name, column in columns.items()} for epoch in range(1, best + 1)]
    half = rows[best // 2 :]
    found = {name: value_and_spread([row[name] for row in half], number)[0] for name, number in numbers.items()}
    schedules = {
        "best": fxstn.Schedule.of(rows[-1]),
        "late": mean(numbers, half, [1.0] * len(half)),
        "found": fxstn.Schedule.of(found),
        "schedule": fxstn.Schedule(columns).until(best),
    }
    trial, losses = Trial(task, seed, start, Limits(best), math.inf), {}
    for kind, schedule in schedules.items():
        values = [schedule.at(epoch) for epoch in range(best)]
        strengths = [{name.removeprefix("input."): x for name, x in one.items()} for one in values]
        losses[kind] = trained_anew(trial, strengths)["test"]
    return losses


def recorded_table(results: dict[str, Any]) -> str:
    """For each reading and start, the geometric mean over all runs of the loss to that with the values of the best epoch."""
    rows = []
    for (reading, start), says in GROUPS.items():
        cells = [one[f"{reading} {start}"] for one in results.values()]
        ratios = [geometric_mean([one[kind] / one["best"] for one in cells]) for kind in RECORDED]
        rows.append([says, *ratios, len(cells)])
    return tabulate(rows, ["", *RECORDED.values(), "runs"], tablefmt="github", disable_numparse=True)


def averages_cell(name: str, seed: int) -> dict[str, Any]:
    """{share of the steps that the averages reach back over, "0" for the last weights: test loss}, and the number of steps."""
    runner, everything = tuned_run(name, seed)
    steps = len(everything) * (runner.history.outcome().epoch or len(runner.history))
    results = {}
    for share in (0, *SHARES):
        model = runner.refit(everything, ema=1 - 1 / max(2, share * steps) if share else None)
        results[str(share)] = scores(TASKS[name], model, TASKS[name].sets(seed)[2])[0]
    return {"scores": results, "steps": steps}


def geometric_mean(ratios: Sequence[float], digits: int = 3, form: str = "{} ± {}") -> str:
    """The geometric mean of ratios, with its standard error."""
    logs = [math.log(ratio) for ratio in ratios]
    numbers = math.exp(statistics.mean(logs)), statistics.stdev(logs) / math.sqrt(len(logs))
    return form.format(*(f"{number:.{digits}f}" for number in numbers))


def table(results: dict[str, Any], titles: dict[str, str], base: str, says: str) -> str:
    """Test losses, means over seeds, and the geometric mean over all cells of the loss to that of one kind.

    titles: {kind: heading}.
    base: the kind.
    says: the ratio, in words.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for key, one in results.items():
        losses = {kind: score[0] if isinstance(score, list) else score for kind, score in one["scores"].items()}
        groups.setdefault(key.split()[0], []).append(losses)
    rows = [
        [task, *(f"{statistics.mean(one[kind] for one in cells):.3f}" for kind in titles), len(cells)]
        for task, cells in groups.items()
    ]
    ratios = [geometric_mean([one[kind] / one[base] for cells in groups.values() for one in cells]) for kind in titles]
    headers = ["task", *titles.values(), "seeds"]
    return tabulate([*rows, [says, *ratios, ""]], headers, tablefmt="github", disable_numparse=True)


def lengths_table(results: dict[str, Any]) -> str:
    titles = {"tuned": "the tuned run"} | VALUES | LENGTHS
    return table(results, titles, "best", "loss / that of the best epoch's values")


def averages_table(results: dict[str, Any]) -> str:
    titles = {"0": "last weights"} | {str(share): f"{100 * share:.0f} % of the steps" for share in SHARES}
    return table(results, titles, "0", "loss / that of the last weights")


# {kind: (what runs a task with a seed, what makes a table)}
KINDS: dict[str, tuple[Callable[[str, int], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "recorded": (recorded_cell, recorded_table),
    "lengths": (cell, lengths_table),
    "averages": (averages_cell, averages_table),
}


def path_of(kind: str) -> Path:
    return RESULTS / f"refits-{kind}.json"


def table_of(kind: str) -> str:
    return KINDS[kind][1](json.loads(path_of(kind).read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="recorded", choices=list(KINDS), help="what is compared")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), help="default: all for recorded ones, else the fast ones"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    file, run = path_of(args.kind), KINDS[args.kind][0]
    tasks = args.tasks or (TASKS if args.kind == "recorded" else FAST)
    torch.set_num_threads(1)
    for seed, task in [(seed, task) for seed in range(args.seeds) for task in tasks]:
        results = json.loads(file.read_text()) if file.exists() else {}
        if (key := f"{task} {seed}") not in results:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[key] = run(task, seed)
            file.write_text(json.dumps(results, separators=(",", ":")) + "\n")
            print(key, results[key], flush=True)
    print(table_of(args.kind))


if __name__ == "__main__":
    main()
