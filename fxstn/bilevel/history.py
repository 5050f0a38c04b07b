"""What happened in each epoch: losses, metrics, λ, σ and times, as rows, as CSV and as a plot of the schedules."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxstn.bilevel.plots import drawn, panels
from fxstn.bilevel.schedule import Schedule

SCALE = "scale:"
LOSSES = ("train_loss", "response_loss", "clean_train_loss", "valid_loss")
DIAGNOSTICS = ("response_norm", "linearization_error", "seconds")


class History:
    """A list of rows, one per epoch. names: the hyperparameters; a row also holds 'scale:NAME', the σ of those that have one.

    Other columns: epoch (from 1), train_loss, response_loss, clean_train_loss (as valid_loss, on training batches),
    valid_loss, one per metric, the problem's diagnostics, seconds.
    """

    def __init__(
        self, names: tuple[str, ...], rows: list[dict[str, Any]] | None = None, start: dict[str, float] | None = None
    ) -> None:
        self.names, self.start = names, start or {}
        self.rows: list[dict[str, Any]] = rows or []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        """One column over all epochs."""
        return [row[column] for row in self.rows]

    def best(self) -> dict[str, Any]:
        """The row with the lowest validation loss. Raises ValueError on an empty history."""
        if not self.rows:
            raise ValueError("the history is empty: no epoch is done yet; call fit first")
        return min(self.rows, key=lambda row: row["valid_loss"])

    def best_values(self) -> dict[str, float]:
        """name → value in the best epoch, to begin a search with: `study.enqueue_trial(history.best_values())` of Optuna.

        Raises ValueError on an empty history.
        """
        best = self.best()
        return {name: best[name] for name in self.names}

    def columns(self) -> list[str]:
        """All columns that a row has, without the epoch."""
        return [column for column in dict.fromkeys(column for row in self.rows for column in row) if column != "epoch"]

    def group(self, column: str) -> str:
        """What a column is: "loss", "hyperparameter", "scale", "diagnostics" (the time too), or "metric": any other."""
        if column in self.names:
            return "hyperparameter"
        if column.startswith(SCALE):
            return "scale"
        if column in DIAGNOSTICS:
            return "diagnostics"
        return "loss" if column in LOSSES else "metric"

    def schedule(self, best: bool = False) -> Schedule:
        """The hyperparameters over epochs, from their start; best: up to the best epoch only, whose values then stay."""
        if not self.rows:
            raise ValueError("the history is empty: there is no schedule yet")
        schedule = Schedule({name: [self.start[name], *self[name]] for name in self.names})
        return schedule.until(self.best()["epoch"]) if best else schedule

    def to_jsonl(self, path: str | Path) -> None:
        """Write a line of JSON for each row, atomically."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(temporary, path)

    def to_csv(self, path: str | Path) -> None:
        """Write all rows, atomically, so that a reader never sees half a table."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "w", newline="") as file:
            columns = dict.fromkeys(column for row in self.rows for column in row)
            writer = csv.DictWriter(file, fieldnames=list(columns) or ["epoch"])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, path)

    def plot(self, path: str | Path) -> None:
        """Draw losses, metrics, schedules of the hyperparameters by kind, σ unless it is kept, and diagnostics into an image; a
        dotted line marks the best epoch.

        Raises ValueError on an empty history, ImportError without matplotlib (fxstn[plot]).
        """
        best, shown = self.best()["epoch"], panels(self)
        figure = drawn(shown, best, "History.plot", columns=min(len(shown), 2 if len(shown) <= 4 else 3))
        figure.savefig(path, dpi=110)
