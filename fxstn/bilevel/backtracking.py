"""Backtracking: λ goes back where it moved and the validation loss rose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxstn.bilevel.history import TAKEN_BACK, Row
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import State

WINDOW = 3  # evaluations whose mean is compared
CERTAINTY = 2.0  # standard errors by which a mean must have risen
LEAST_MOVE = 0.3  # unconstrained; less than this explains no rise


@dataclass(frozen=True)
class Point:
    """What an evaluation showed. It never changes, so that states share it.

    valid, train: losses without dropout and augmentation; NaN for a training loss that was not measured.
    place: λ, unconstrained.
    """

    valid: float
    train: float
    place: list[float]


def noise(losses: Sequence[float]) -> float:
    """The standard deviation of the noise of a series, from its second differences, which a trend does not enter.

    Infinity for fewer than five losses, which say nothing of their noise.
    """
    if len(losses) < 5:
        return math.inf
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return 1.4826 * statistics.median(bends) / math.sqrt(6)  # a bend of Gaussian noise has six times its variance


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


class Backtracking:
    """Compares the validation loss before and after λ has moved, and takes back a move that did harm.

    optimizer: of λ. None, or another one than a `SettlingAdam`: nothing is taken back.
    problem: has λ, and says which numbers regularise. Others stay.
    on: whether the run measures the training loss in eval mode, too. A joint problem, whose weights are those at λ, has to be
        off: its network would no longer be the one that was evaluated.

    The means of `WINDOW` evaluations are compared: the last ones, and those with the lowest validation loss since λ was taken
    back last. Where the validation loss has risen by more than its noise, the training loss says which moves to blame. If its
    own rise is more than half of that, the network is held back, and what has risen since then did it. Else most of the rise is
    of the distance between the losses: the network overfits, and what has fallen did it. These numbers go back to where they
    were at the lowest validation loss, and their steps are half as long from then on: a backtracking line search (Armijo 1966),
    number by number, on what is measured anyway.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, problem: BilevelProblem, on: bool) -> None:
        self.optimizer = optimizer if on and isinstance(optimizer, SettlingAdam) else None
        self.problem, self.regularizing = problem, tuple(problem.regularizing())
        self.losses: list[float] = []
        self.points: list[Point] = []  # since λ was taken back last

    def review(self, row: Row) -> Row:
        """Add an evaluation; takes moves back where it must. Returns {TAKEN_BACK: how many numbers it took back}, or {}.

        row: of the history.
        """
        if self.optimizer is None:
            return {}
        (unconstrained,) = self.problem.hyper_parameters()
        self.losses.append(row["valid_loss"])
        train = row.get("clean_train_loss", math.nan)
        self.points.append(Point(row["valid_loss"], train, unconstrained.tolist()))
        before, blame = self.blame()
        if blame:
            flags = torch.tensor([number in blame for number in range(len(before))], device=unconstrained.device)
            self.optimizer.take_back(unconstrained, unconstrained.new_tensor(before), flags)
            self.points.clear()
        return {TAKEN_BACK: float(len(blame))}

    def blame(self) -> tuple[list[float], list[int]]:
        """(λ at the lowest validation loss, the numbers whose moves since then did harm)."""
        points = self.points
        if len(points) < 2 * WINDOW:
            return [], []
        windows = [points[end - WINDOW : end] for end in range(WINDOW, len(points) - WINDOW + 1)]
        valid_means = [_mean([point.valid for point in window]) for window in windows]
        best, last = windows[min(range(len(windows)), key=valid_means.__getitem__)], points[-WINDOW:]
        valid_rise, train_rise = (
            _mean([getattr(point, name) for point in last]) - _mean([getattr(point, name) for point in best])
            for name in ("valid", "train")
        )
        error = noise(self.losses) * math.sqrt(2 / WINDOW)
        if not valid_rise > CERTAINTY * error or math.isnan(train_rise):
            return [], []
        before = [statistics.fmean(places) for places in zip(*(point.place for point in best), strict=True)]
        moves = [now - then for now, then in zip(points[-1].place, before, strict=True)]
        sign = 1 if train_rise > valid_rise / 2 else -1
        blame = [
            number
            for number, (move, own) in enumerate(zip(moves, self.regularizing, strict=True))
            if own and sign * move > LEAST_MOVE
        ]
        return before, blame

    def state_dict(self) -> State:
        return {"losses": list(self.losses), "points": [vars(point) for point in self.points]}

    def load_state_dict(self, state: State) -> None:
        self.losses = list(state["losses"])
        self.points = [Point(**point) for point in state["points"]]
