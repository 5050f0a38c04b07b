"""The columns of a practitioner who searches: ASHA, population based training, random search. All begin with the recipe.

A search draws one rate for all dropout modules, one weight decay and each strength of the augmentations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from copy import copy
from dataclasses import replace

from benchmarks.worth.cells import Cell, Trial, of_run, trained_anew, with_refit
from benchmarks.worth.tasks import STRENGTHS, Task
from benchmarks.worth.training import Limits, Plain

MANY = 30  # trials of random search
ETA = 3  # of successive halving: the share of the trials that go on is 1/ETA
RESAMPLED = 0.25  # chance that an explored strength is drawn anew (Jaderberg et al. 2017)
FACTORS = (0.8, 1.2)
# Ends that exploration keeps to: those of the ranges in which fxstn tunes.
MOST = {"dropout": 0.95, "weight_decay": 1e-1, "flip": 1.0, "rotation": 45.0, "translate": 0.5, "scale": 0.5, "shear": 45.0,
        "holes": 5.0, "length": 24.0}  # fmt: skip


def drawn(name: str, numbers: random.Random) -> float:
    """A strength in the range of a search: dropout up to 0.7, weight decay 1e-6 to 1e-2 evenly in its logarithm, others from 0
    to their high start."""
    if name == "dropout":
        return numbers.uniform(0, 0.7)
    if name == "weight_decay":
        return 10 ** numbers.uniform(-6, -2)
    if name == "flip":
        return numbers.uniform(0, 1)
    high = STRENGTHS[name][2]
    return float(numbers.randint(0, round(high))) if name in ("holes", "length") else numbers.uniform(0, high)


def sample(task: Task, numbers: random.Random) -> dict[str, float]:
    return {name: drawn(name, numbers) for name in task.strengths("recipe")}


class Best:
    """The run with the lowest validation loss of those that a search has seen."""

    def __init__(self) -> None:
        self.run: Plain | None = None
        self.loss = math.inf

    def offer(self, run: Plain) -> None:
        if run.best < self.loss:
            self.loss, self.run = run.best, run

    def cell(self, trial: Trial, seconds: float, trials: int) -> Cell:
        """With a refit at the strengths of the best trial, for as many epochs as its best one had."""
        if self.run is None:
            raise RuntimeError("no trial of the search has a finite loss")
        values = dict(self.run.strengths)
        return with_refit(trial, of_run(trial, self.run, seconds, trials=trials, values=values), values)


def name_of(search: str, multiple: int) -> str:
    return search if multiple == 1 else f"{search}-{multiple}"


def random_search(trial: Trial) -> dict[str, Cell]:
    """MANY whole runs, of which the one with the lowest validation loss counts."""
    numbers, best, seconds = random.Random(trial.seed), Best(), 0.0
    train, valid, _ = trial.task.sets(trial.seed)
    for number in range(MANY):
        strengths = sample(trial.task, numbers) if number else trial.strengths
        run = Plain(trial.task, strengths, trial.seed + 10_000 * number).run(train, valid, trial.limits)
        best.offer(run)
        seconds += run.seconds
    return {"random-30": best.cell(trial, seconds, MANY)}


class Halving:
    """Successive halving without waiting, by one worker.

    rungs: epochs after which a trial goes on only if it is among the best 1/ETA of those that came as far.
    """

    def __init__(self, epochs: int) -> None:
        self.rungs = sorted({max(1, epochs // ETA**power) for power in (2, 1, 0)})
        self.losses: list[dict[int, float]] = [{} for _ in self.rungs]
        self.promoted: set[tuple[int, int]] = set()

    def next(self) -> tuple[int, int] | None:
        """(trial, rung) of one that goes on, from the highest rung; None: a new trial begins."""
        for rung in reversed(range(len(self.rungs) - 1)):
            ranked = sorted(self.losses[rung], key=self.losses[rung].__getitem__)
            for number in ranked[: len(ranked) // ETA]:
                if (number, rung) not in self.promoted and math.isfinite(self.losses[rung][number]):
                    self.promoted.add((number, rung))
                    return number, rung + 1
        return None


def asha(trial: Trial, multiples: tuple[int, ...] = (1, 4)) -> dict[str, Cell]:
    """Successive halving (Li et al. 2020, arXiv 1810.05934), a cell for each multiple of the budget. The recipe comes first,
    and is trained to its end."""
    numbers, best, cells, halving = random.Random(trial.seed), Best(), {}, Halving(trial.limits.epochs)
    train, valid, _ = trial.task.sets(trial.seed)
    runs: list[Plain] = []
    todo, seconds = [(0, rung) for rung in range(len(halving.rungs))], 0.0
    halving.promoted |= {(0, rung) for rung in range(len(halving.rungs))}
    left = list(multiples)
    while left:
        number, rung = todo.pop(0) if todo else halving.next() or (len(runs), 0)
        if number == len(runs):
            strengths = sample(trial.task, numbers) if number else trial.strengths
            runs.append(Plain(trial.task, strengths, trial.seed + 10_000 * number))
        run, before = runs[number], runs[number].seconds
        run.run(train, valid, replace(trial.limits, epochs=halving.rungs[rung]))
        seconds += run.seconds - before
        halving.losses[rung][number] = run.best
        best.offer(run)
        while left and not todo and seconds >= left[0] * trial.budget:
            cells[name_of("asha", left[0])] = best.cell(trial, seconds, len(runs))
            left.pop(0)
    return cells


def explored(strengths: Mapping[str, float], numbers: random.Random) -> dict[str, float]:
    """Each strength multiplied by one of FACTORS, or drawn anew."""
    result = {}
    for name, value in strengths.items():
        new = drawn(name, numbers) if numbers.random() < RESAMPLED else value * numbers.choice(FACTORS)
        result[name] = min(new, MOST[name])
    return result


def pbt(trial: Trial, multiples: tuple[int, ...] = (1, 4)) -> dict[str, Cell]:
    """Population based training (Jaderberg et al. 2017, arXiv 1711.09846) with truncation, a population for each multiple of
    the budget: 4 members, or 8. Its refit repeats the schedule of the best member."""
    return {name_of("pbt", multiple): _population(trial, 4 if multiple == 1 else 8, multiple * trial.budget)
            for multiple in multiples}  # fmt: skip


def _population(trial: Trial, members: int, budget: float) -> Cell:
    """After each twelfth of the task's epochs the last quarter goes on from the weights of the first, at explored strengths."""
    task, numbers = trial.task, random.Random(trial.seed)
    train, valid, _ = task.sets(trial.seed)
    turn, winner, schedule = max(1, task.epochs // 12), None, []
    runs = [
        Plain(task, sample(task, numbers) if number else trial.strengths, trial.seed + 10_000 * number)
        for number in range(members)
    ]
    paths: list[list[Mapping[str, float]]] = [[] for _ in runs]  # the strengths of each epoch so far
    while sum(run.seconds for run in runs) < budget:
        for run, path in zip(runs, paths, strict=True):
            run.run(train, valid, Limits(len(run.curve) + turn))
            path += [run.strengths] * turn
            if winner is None or run.best < winner.best:
                winner, schedule = copy(run), path[: run.best_epoch]
        ranked = sorted(range(members), key=lambda number: runs[number].curve[-1])
        for worse, better in zip(ranked[::-1][: members // 4], ranked, strict=False):
            runs[worse].follow(runs[better])
            paths[worse] = list(paths[better])
            runs[worse].set(explored(runs[better].strengths, numbers))
    if winner is None or not schedule:
        raise RuntimeError("no member of the population has a finite loss")
    seconds = sum(run.seconds for run in runs)
    cell = of_run(trial, winner, seconds, trials=members, values=dict(schedule[-1]))
    return cell | {"refit": trained_anew(trial, schedule)}
