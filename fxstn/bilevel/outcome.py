"""What a run has come to: the values that a refit trains with, how sure they are, whether λ has settled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fxstn.hp.hyperparameter import Hyperparameter

MOVE = 0.25  # of λ, unconstrained, within the last quarter of the epochs: further than that it has not settled
ENOUGH = 3  # epochs, to be compared with the start
WORSE = 0.01  # share of the loss at the start that no epoch may be above it
LEAST = 4  # epochs that λ is looked at, and a loss at the end
FEW = 6  # epochs; of fewer it is not said whether the network still learns
FALL = 0.05  # share of a loss by which it falls within the last quarter of the epochs while a network still learns fast
Row = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """The values of a run: what `refit` trains with, and reports and searches call its values.

    values: {name: mean over the second half of the epochs up to the best one, or that of the best one}: of a number that
        regularises the weaker of both, of others the mean. λ is averaged before it is mapped to its range (logarithms, where
        there is no upper end), and an integer is rounded down. Where no range is known the values are.
    spread: {name: standard deviation over the same epochs}, of λ too, in units of the value: half the distance of the values
        one standard deviation below and above the mean. 0 for one epoch.
    unsettled: names of those that still moved at the end of the run, by more than `MOVE` in the last quarter of its epochs.
    epoch: the best one; 0 where none was better than the start.
    """

    values: dict[str, float]
    spread: dict[str, float]
    unsettled: tuple[str, ...]
    epoch: int

    @property
    def settled(self) -> bool:
        """Whether λ moved no more at the end."""
        return not self.unsettled


def quarter(rows: Sequence[Row]) -> Sequence[Row]:
    """The last quarter of the epochs, `LEAST` at least, and the epoch before them; fewer where there are no more."""
    return rows[-(max(LEAST, math.ceil(len(rows) / 4)) + 1) :]


def point_of(value: float, number: Hyperparameter | None) -> float:
    """λ at a value, or at the nearest one of its range, a little inside; the value itself where no range is known."""
    if number is None:
        return value
    value = min(max(value, number.low), number.high)  # a run may go on with another range
    return number.unconstrained_at(value if number.integer else number.inside(value))


def value_and_spread(values: Sequence[float], number: Hyperparameter | None) -> tuple[float, float]:
    """What a number has come to, and its standard deviation in units of the value; see `Outcome`.

    values: of the second half of the epochs up to the best one.

    While a network overfits, λ rises with the age of the weights. New weights, on more data, need no stronger regularisation
    than those had on the average. Where λ falls on the way to its place, the last value is nearer to it.
    """
    points = [point_of(value, number) for value in values]
    mean, deviation = statistics.mean(points), statistics.pstdev(points)
    if number is None:
        return mean, deviation
    low, middle, high = (number.value_at(point) for point in (mean - deviation, mean, mean + deviation))
    value = float(math.floor(middle)) if number.integer else middle
    last = float(min(max(values[-1], number.low), number.high))
    weaker = number.regularizes and last <= value
    constant = len(set(values)) == 1  # as it is, not as it comes back from the real line
    return last if weaker or constant else value, (high - low) / 2


def still_moves(rows: Sequence[Row], name: str, number: Hyperparameter | None) -> bool:
    """Whether λ still moves at the end: its line of least squares over the last quarter of the epochs rises or falls by more
    than `MOVE`, in units of the mean where no range is known. False where there are too few epochs to tell."""
    last = quarter(rows)
    if len(last) < LEAST:
        return False
    points = [point_of(row[name], number) for row in last]
    scale = 1.0 if number is not None else max(abs(statistics.mean(points)), 1e-12)
    slope = statistics.linear_regression(range(len(points)), points).slope
    return abs(slope) * (len(points) - 1) > MOVE * scale


def still_learns(rows: Sequence[Row]) -> bool:
    """Whether the validation loss falls clearly at the end of a run: its lowest value is the last, and it has fallen by more
    than `FALL` of it within the last quarter of the epochs, more than it goes up and down on the way."""
    losses, last = ([row["valid_loss"] for row in part] for part in (rows, quarter(rows)))
    if len(losses) < FEW or not all(map(math.isfinite, last)) or min(losses) < losses[-1]:
        return False
    rises = sum(max(0.0, after - before) for before, after in pairwise(last))
    fall = last[0] - last[-1]
    return fall > FALL * abs(last[-1]) and fall > rises


def end_signs(rows: Sequence[Row], start_loss: float | None) -> Iterator[tuple[str, str]]:
    """(sign, text) of what is to be said of a whole run.

    start_loss: the validation loss before the first epoch; None: not known.
    """
    losses = [row["valid_loss"] for row in rows]
    if start_loss is not None and len(rows) >= ENOUGH and min(losses) - start_loss > WORSE * abs(start_loss):
        yield "start", (f"no epoch has a validation loss below that of the start, {start_loss:.4g} (the lowest: "
                        f"{min(losses):.4g}): the best model is that of the start, and so are the values; lower the learning "
                        "rate of the weights")  # fmt: skip
    if still_learns(rows):
        before = quarter(rows)[0]["valid_loss"]
        yield "learning", (f"the network still learns fast: the validation loss fell from {before:.4g} to {losses[-1]:.4g} in "
                           "the last quarter of the epochs; training longer pays more than tuning")  # fmt: skip
