"""The schedule of λ over the epochs of a run, which another network can be trained with."""

from __future__ import annotations

import json
import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from fxstn.bilevel.files import json_text, write_text
from fxstn.ir.input_errors import as_file, as_path, is_number

FORMAT = "fxstn-schedule-1"
SHOWN = 4  # values in the repr


class Schedule:
    """Values of hyperparameters over the epochs of a run.

    values: {name: [value, …]}, where number k is the value after k epochs; number 0 is the start. Between two epochs it is a
        straight line.
    unsettled: names of the values that still moved when the run ended; `final` warns of them.

    Raises ValueError where the lists are empty or differ in length, TypeError where they do not hold finite numbers.
    """

    def __init__(self, values: Mapping[str, Sequence[float]], unsettled: Sequence[str] = ()) -> None:
        if not isinstance(values, dict) or not all(isinstance(column, (list, tuple)) for column in values.values()):
            raise TypeError(f"a schedule is made of a dict, {{name: [value, …]}}, got {reprlib.repr(values)}")
        for name, column in values.items():
            if wrong := [value for value in column if not _is_finite(value)]:
                text = f"a schedule needs finite numbers, and has {reprlib.repr(wrong[0])} among the values of {name!r}"
                raise TypeError(f"{text}; mend it")
        lengths = {len(column) for column in values.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"a schedule needs as many values of each hyperparameter, at least one; got {sorted(lengths)}"
            )
        self.values = {name: [float(value) for value in column] for name, column in values.items()}
        self.unsettled = tuple(unsettled)

    @property
    def epochs(self) -> int:
        """The number of epochs."""
        return len(next(iter(self.values.values()))) - 1

    def at(self, epoch: float) -> dict[str, float]:
        """{name: value} at a time.

        epoch: ≥ 0, the time in epochs, which may be a fraction. After the end it is the last value.

        Raises ValueError for a time before the start.
        """
        if not epoch >= 0:
            raise ValueError(f"a schedule begins at epoch 0, and has nothing at epoch {epoch}")
        time = min(epoch, self.epochs)
        whole = int(time)
        after, share = min(whole + 1, self.epochs), time - whole
        return {name: _between(column[whole], column[after], share) for name, column in self.values.items()}

    def until(self, epoch: int) -> Schedule:
        """The same up to an epoch, ≥ 0, whose values stay from there on. Raises ValueError for one before the start."""
        if epoch < 0:
            raise ValueError(f"a schedule begins at epoch 0, and cannot end at epoch {epoch}")
        return Schedule({name: column[: epoch + 1] for name, column in self.values.items()})

    def final(self) -> Schedule:
        """The last values, from the first epoch on. Warns where these still moved when the run ended."""
        if self.unsettled:
            text = (f"the last values of {', '.join(self.unsettled)} are not what the run has come to, for they still moved "
                    "when it ended; take fxstn.Schedule.of(history.outcome().values), or train for longer")  # fmt: skip
            warnings.warn(text, stacklevel=2)
        return Schedule({name: column[-1:] for name, column in self.values.items()})

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Schedule:
        """The same values from the first epoch on."""
        return cls({name: [value] for name, value in values.items()})

    def for_epochs(self, epochs: int) -> Schedule:
        """A copy that runs through the same values in another number of epochs, ≥ 1. Raises ValueError for fewer."""
        if epochs < 1:
            raise ValueError(f"a schedule takes one epoch or more, not {epochs}")
        points = [self.at(self.epochs * k / epochs) for k in range(epochs + 1)]
        return Schedule({name: [point[name] for point in points] for name in self.values}, self.unsettled)

    def __repr__(self) -> str:
        """Its length, and the first and the last value of the first hyperparameters."""
        ends = {name: [f"{column[0]:.4g}", f"{column[-1]:.4g}"] for name, column in self.values.items()}
        texts = [f"{name} {' to '.join(dict.fromkeys(pair))}" for name, pair in ends.items()]
        more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
        return f"Schedule(epochs={self.epochs}; {', '.join([*texts[:SHOWN], *more])})"

    def to_json(self, path: str | Path) -> None:
        """Write the schedule to path, a file that `from_json` reads."""
        text = json_text({"format": FORMAT, "values": self.values, "unsettled": list(self.unsettled)}, indent=1)
        write_text(as_file(path, "Schedule.to_json"), text + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Schedule:
        """Read the file at path. Raises ValueError where it is not a schedule."""
        path = as_path(path, "Schedule.from_json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable schedule: {error}; History.schedule().to_json writes one"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a schedule of fxstn; History.schedule().to_json writes one")
        try:
            return cls(content.get("values", {}), content.get("unsettled") or ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no whole schedule: {error}") from error


def _is_finite(value: object) -> bool:
    """Whether a value is a number that Python's float can hold."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


def _between(before: float, after: float, share: float) -> float:
    """The value at a share of the way, never beyond the two: between equal ones it is theirs, to the last bit."""
    return min(max((1 - share) * before + share * after, min(before, after)), max(before, after))
