"""The schedule that a run found: to a file and back, and what `BilevelRunner(..., schedule=)` trains a fresh network with."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Schedule:
    """Values of hyperparameters over epochs: values[name][k] after k epochs, k = 0 at the start; a straight line in between.

    Raises ValueError where the lists differ in length, or are empty, TypeError for what is no lists of finite numbers.
    """

    def __init__(self, values: dict[str, Sequence[float]]) -> None:
        if not isinstance(values, dict) or not all(isinstance(column, (list, tuple)) for column in values.values()):
            raise TypeError(f"a schedule is made of a dict, {{name: [value, …]}}, got {reprlib.repr(values)}")
        for name, column in values.items():
            if wrong := [value for value in column if not isinstance(value, (int, float)) or not math.isfinite(value)]:
                raise TypeError(
                    f"a schedule needs finite numbers, and has {wrong[0]!r} among the values of {name!r}; mend it"
                )
        lengths = {len(column) for column in values.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"a schedule needs as many values of each hyperparameter, at least one; got {sorted(lengths)}"
            )
        self.values = {name: [float(value) for value in column] for name, column in values.items()}

    @property
    def epochs(self) -> int:
        return len(next(iter(self.values.values()))) - 1

    def at(self, epoch: float) -> dict[str, float]:
        """name → value at a time in epochs, a fraction within one; the last value after the end."""
        whole = min(int(epoch), self.epochs)
        after, share = min(whole + 1, self.epochs), min(epoch, self.epochs) - whole
        return {name: (1 - share) * column[whole] + share * column[after] for name, column in self.values.items()}

    def until(self, epoch: int) -> Schedule:
        """The same up to an epoch, whose values stay."""
        return Schedule({name: column[: epoch + 1] for name, column in self.values.items()})

    def final(self) -> Schedule:
        """The last values from the first epoch on."""
        return Schedule({name: column[-1:] for name, column in self.values.items()})

    def stretched(self, epochs: int) -> Schedule:
        """The same course over another number of epochs."""
        points = [self.at(self.epochs * k / epochs) for k in range(epochs + 1)]
        return Schedule({name: [point[name] for point in points] for name in self.values})

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"format": "fxstn-schedule-1", "values": self.values}, indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Schedule:
        """Raises ValueError where the file is no schedule."""
        try:
            content: Any = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable schedule: {error}; History.schedule().to_json writes one"
            ) from error
        if not isinstance(content, dict) or content.get("format") != "fxstn-schedule-1":
            raise ValueError(f"{path} is not a schedule of fxstn; History.schedule().to_json writes one")
        try:
            return cls(content.get("values"))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"{path} holds no whole schedule: {error}") from error
