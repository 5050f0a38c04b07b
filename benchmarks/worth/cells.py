"""Cells of the table: what one column reached on one task with one seed; in benchmarks/results/worth/TASK.json."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.worth.tasks import Task
from benchmarks.worth.training import Limits, Plain, joined, scores
from fxstn.bilevel.refit import AVERAGED

RESULTS = Path(__file__).resolve().parents[1] / "results" / "worth"
READINGS = ("time", "patience")  # equal time; every column until its validation loss stops falling
LONGEST = 6  # times a task's epochs, in the second reading
Cell = dict[str, Any]


def key_of(reading: str, column: str, start: str, seed: int) -> str:
    return f"{reading} {column} {start} {seed}"


def path_of(task: str) -> Path:
    return RESULTS / f"{task}.json"


def read(task: str) -> dict[str, Cell]:
    """{key: cell} of a task; empty where nothing was run."""
    path = path_of(task)
    return json.loads(path.read_text()) if path.exists() else {}


def add(task: str, cells: dict[str, Cell]) -> None:
    """Write further cells beside those in the file, atomically."""
    path = path_of(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    lines = [f"{json.dumps(key)}:{json.dumps(cell)}" for key, cell in sorted((read(task) | cells).items())]
    new.write_text("{" + ",\n".join(lines) + "}\n")
    new.replace(path)


@cache
def origin() -> dict[str, str]:
    """Versions that a cell was measured with."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {"torch": torch.__version__, "commit": done.stdout.strip()}


@dataclass(frozen=True)
class Trial:
    """What a column is to do: a task, a seed, a start, and when to end.

    limits: of one run. budget: seconds of the CPU that a search may take in all.
    """

    task: Task
    seed: int
    start: str
    limits: Limits
    budget: float

    @property
    def strengths(self) -> dict[str, float]:
        return self.task.strengths(self.start)


def outcome(trial: Trial, network: nn.Module, seconds: float, **more: Any) -> Cell:
    """A cell: test loss and metric of a network, and what else is known."""
    loss, metric = scores(trial.task, network, trial.task.sets(trial.seed)[2])
    return {"test": loss, "metric": metric, "seconds": round(seconds, 3), **more, **origin()}


def of_run(trial: Trial, run: Plain, seconds: float | None = None, **more: Any) -> Cell:
    """The cell of a run, at its best epoch."""
    told = {"valid": run.best, "epochs": len(run.curve), "best_epoch": run.best_epoch}
    return outcome(trial, run.best_network(), run.seconds if seconds is None else seconds, **told, **more)


def trained_anew(trial: Trial, schedule: Sequence[Mapping[str, float]], **how: Any) -> Cell:
    """From the weights of the seed on training and validation data, at the strengths of each epoch; a cell's "refit".

    Its weights are averaged at the end, as those of our own refit are, so that what is compared is the strengths.
    """
    train, valid, _ = trial.task.sets(trial.seed)
    run, everything = Plain(trial.task, schedule[0], trial.seed, **how), joined(train, valid)
    run.average(round(AVERAGED * len(schedule) * math.ceil(len(everything) / trial.task.batch)))
    for epoch, strengths in enumerate(schedule):
        run.set(strengths)
        run.run(everything, None, Limits(epoch + 1))
    return refit_of(trial, run.best_network(), run.seconds)


def refit_of(trial: Trial, network: nn.Module, seconds: float) -> Cell:
    """What a network that was trained anew adds to a cell."""
    cell = outcome(trial, network, seconds)
    return {name: cell[name] for name in ("test", "metric", "seconds")}


def with_refit(trial: Trial, cell: Cell, strengths: Mapping[str, float], **how: Any) -> Cell:
    """The strengths kept for as many epochs as the best one had."""
    return cell | {"refit": trained_anew(trial, [strengths] * max(1, cell["best_epoch"]), **how)}
