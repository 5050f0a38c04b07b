"""What happened in each epoch: losses, metrics, λ, σ and times, as rows, as CSV and as a plot of the schedules."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxstn.bilevel.schedule import Schedule

SCALE = "scale:"


class History:
    """A list of rows, one per epoch. names: the hyperparameters; a row also holds 'scale:NAME', the σ of those that have one.

    Other columns: epoch (from 1), train_loss, response_loss, valid_loss, a column per metric, seconds.
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
        return min(self.rows, key=lambda row: row["valid_loss"])

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
        """Draw losses, hyperparameter schedules and σ over epochs into an image. Needs matplotlib (fxstn[plot])."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("History.plot needs matplotlib: pip install 'fxstn[plot]'") from error
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(name.rpartition(".")[2], []).append(name)
        scaled = [name for name in self.names if all(SCALE + name in row for row in self.rows)]
        panels = len(groups) + 1 + bool(scaled)
        columns = 2 if panels > 3 else panels
        rows = -(-panels // columns)
        figure = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        epochs = self["epoch"]
        for column in ("train_loss", "valid_loss"):
            axes[0].plot(epochs, self[column], label=column.replace("_", " "))
        positive = all(value > 0 for column in ("train_loss", "valid_loss") for value in self[column])
        axes[0].set(title="loss", xlabel="epoch", yscale="log" if positive else "linear")
        for axis, (kind, names) in zip(axes[1:], groups.items(), strict=False):
            for name in names:
                axis.plot(epochs, self[name], label=name.removesuffix(f".{kind}"))
            axis.set(title=kind.replace("_", " "), xlabel="epoch")
            if kind == "weight_decay":
                axis.set_yscale("log")
        if scaled:
            for name in scaled:
                axes[panels - 1].plot(epochs, self[SCALE + name], label=name)
            axes[panels - 1].set(title="perturbation scale σ", xlabel="epoch")
        for axis in axes[:panels]:
            handles, _ = axis.get_legend_handles_labels()
            if 1 <= len(handles) <= 12:
                axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
        for axis in axes[panels:]:
            axis.axis("off")
        figure.savefig(path, dpi=110)
