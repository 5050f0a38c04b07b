"""What happened in each epoch: losses, metrics, λ, σ and times."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fxstn.bilevel.files import json_text, write_text
from fxstn.bilevel.outcome import Outcome, still_moves, value_and_spread
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.plots import Groups, figure_of, panels, save_figure
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.state import State
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.ir.input_errors import as_file

SCALE = "scale:"
LOSSES = ("train_loss", "response_loss", "clean_train_loss", "valid_loss")
TAKEN_BACK = "taken_back"  # how many numbers of λ went back after the epoch
DIAGNOSTICS = ("response_norm", "linearization_error", TAKEN_BACK, "seconds")
Row = dict[str, float]


class History:
    """One row of numbers per epoch.

    names: of the hyperparameters.
    rows: {column: number} of each epoch so far.
    start: {name: value} of the hyperparameters before the first epoch.
    numbers: {name: what is known of it}, for means on its scale.
    start_loss: the validation loss before the first epoch; None where it was not measured.

    Columns: epoch (from 1), train_loss, response_loss, clean_train_loss (valid_loss on training batches), valid_loss, one for
    each metric, one for each hyperparameter, "scale:NAME" (its σ, where it has one), the problem's diagnostics, seconds.
    train_loss is that of the steps, under dropout and augmentation. As in a loop with an optimizer's own weight decay, that is
    not part of it; response_loss has it, for its gradient in Θ.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        rows: list[Row] | None = None,
        start: dict[str, float] | None = None,
        numbers: Mapping[str, Hyperparameter] | None = None,
    ) -> None:
        self.names, self.start, self.numbers = names, start or {}, numbers or {}
        self.rows: list[Row] = rows or []
        self.start_loss: float | None = None

    @classmethod
    def starting_at(cls, values: dict[str, float], numbers: Sequence[Hyperparameter]) -> History:
        """That of a run before its first epoch. numbers: what is known of the values."""
        return cls(tuple(values), start=values, numbers={number.name: number for number in numbers})

    def __repr__(self) -> str:
        """How many epochs and hyperparameters it has, and the lowest validation loss."""
        best = [self.best()] if any("valid_loss" in row for row in self.rows) else []
        lowest = "".join(f", best_epoch={row['epoch']:.0f}, valid_loss={row['valid_loss']:.4g}" for row in best)
        return f"History(epochs={len(self)}, hyperparameters={len(self.names)}{lowest})"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[float]:
        """One column over all epochs; NaN where a row does not have it, as before a metric was added.

        Raises KeyError for a column that no row has.
        """
        if self.rows and not any(column in row for row in self.rows):
            raise KeyError(f"the history has no column {column!r}; it has {', '.join(self.columns())}")
        return [row.get(column, math.nan) for row in self.rows]

    def best(self) -> Row:
        """The row with the lowest validation loss. Where no epoch is better than the start, it is that of the start: epoch 0,
        the loss before training, and the values.

        Raises ValueError on an empty history, or on one without such losses.
        """
        if not self.rows:
            raise ValueError(
                "the history is empty: no epoch is done yet; call fit first, or go on with your loop; without a "
                "train_loader, call tuner.end_epoch() after each epoch"
            )
        if not (evaluated := [row for row in self.rows if "valid_loss" in row]):
            raise ValueError(
                "no epoch is the best one: the run has no validation data, as a refit; its last epoch counts"
            )
        best = min(evaluated, key=lambda row: (math.isnan(row["valid_loss"]), row["valid_loss"]))
        if self.start_loss is not None and not best["valid_loss"] < self.start_loss:
            return {"epoch": 0, "valid_loss": self.start_loss, **self.start}
        return best

    def best_values(self) -> dict[str, float]:
        """{name: value} that the run has come to, as `outcome` has them. Raises ValueError on an empty history.

        A search can begin with them: `study.enqueue_trial(history.best_values())` of Optuna.
        """
        return self.outcome().values

    def outcome(self) -> Outcome:
        """What the run has come to: the values that `refit` takes. Raises ValueError on an empty history."""
        epoch = int(self.best()["epoch"])
        rows = self.rows[epoch // 2 : epoch] or [self.start]
        pairs = {name: value_and_spread([row[name] for row in rows], self.numbers.get(name)) for name in self.names}
        values, spread = ({name: pair[part] for name, pair in pairs.items()} for part in (0, 1))
        unsettled = tuple(name for name in self.names if still_moves(self.rows, name, self.numbers.get(name)))
        return Outcome(values, spread, unsettled, epoch)

    def columns(self) -> list[str]:
        """All columns that a row has, without the epoch."""
        return [column for column in dict.fromkeys(column for row in self.rows for column in row) if column != "epoch"]

    def group(self, column: str) -> str:
        """The kind of a column: "loss", "hyperparameter", "scale", "diagnostics" (the time too), or "metric" for any other."""
        if column in self.names:
            return "hyperparameter"
        if column.startswith(SCALE):
            return "scale"
        if column in DIAGNOSTICS:
            return "diagnostics"
        return "loss" if column in LOSSES else "metric"

    def groups(self) -> Groups:
        """{group: {column: a number per epoch}}; NaN where a row does not have the column."""
        result: Groups = {}
        for column in self.columns():
            result.setdefault(self.group(column), {})[column] = [float(row.get(column, math.nan)) for row in self.rows]
        return result

    def tagged(self, row: Row) -> dict[str, float]:
        """A row as loggers have it: loss/valid, metric/NAME, hyperparameter/NAME, scale/NAME, diagnostics/NAME.

        The epoch and numbers that are not finite are left out.
        """
        result = {}
        for column, value in row.items():
            if column != "epoch" and math.isfinite(value):
                group = self.group(column)
                name = column.removesuffix("_loss") if group == "loss" else column.removeprefix(SCALE)
                result[f"{group}/{name}"] = value
        return result

    def schedule(self, best: bool = False) -> Schedule:
        """The hyperparameters over the epochs, from their start on.

        best: whether the values stay from the best epoch on.

        Raises ValueError on an empty history.
        """
        if not self.rows:
            raise ValueError("the history is empty: there is no schedule yet; call fit first, or train on in your loop")
        schedule = Schedule({name: [self.start[name], *self[name]] for name in self.names})
        if best:
            return schedule.until(int(self.best()["epoch"]))
        schedule.unsettled = tuple(name for name in self.names if still_moves(self.rows, name, self.numbers.get(name)))
        return schedule

    def to_jsonl(self, path: str | Path) -> None:
        """Write a line of JSON for each row to path, atomically. A number that is NaN or infinite becomes null."""
        write_text(
            as_file(path, "History.to_jsonl"), "".join(json_text(plain_numbers(row)) + "\n" for row in self.rows)
        )

    def to_csv(self, path: str | Path) -> None:
        """Write all rows to path, atomically, so that a reader never sees half a table."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row)) or ["epoch"]
        writer = csv.writer(table := io.StringIO(newline=""))  # a DictWriter takes twice as long
        writer.writerow(columns)
        writer.writerows([row.get(column, "") for column in columns] for row in self.rows)
        write_text(as_file(path, "History.to_csv"), table.getvalue())

    def plot(self, path: str | Path) -> None:
        """Draw the history into the image at path: losses, metrics, hyperparameters by kind, σ where it moves, diagnostics.

        A dotted line marks the best epoch.

        Raises ValueError on an empty history, ImportError without matplotlib (fxstn[plot]).
        """
        best, shown = int(self.best()["epoch"]), panels(self.groups(), self.start)
        figure = figure_of(shown, best, "History.plot", columns=min(len(shown), 2 if len(shown) <= 4 else 3))
        save_figure(figure, as_file(path, "History.plot"), dpi=110)

    def state_dict(self) -> State:
        """What `load_state_dict` goes on from."""
        return {"start": self.start, "start_loss": self.start_loss, "rows": list(self.rows)}

    def load_state_dict(self, state: State) -> None:
        """Become the history whose `state_dict` the state is."""
        self.start, self.start_loss, self.rows = state["start"], state["start_loss"], list(state["rows"])
