"""What happened in each epoch: losses, metrics, λ, σ and times; and the schedule of λ, to train another network with."""

from __future__ import annotations

import csv
import io
import json
import math
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fxstn.bilevel.files import json_text, write_text
from fxstn.bilevel.outcome import Outcome, still_moves, value_and_spread
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.plots import Groups, figure_of, panels, save_figure
from fxstn.bilevel.state import State
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.ir.input_errors import as_file, as_path, is_number

SCALE = "scale:"
LOSSES = ("train_loss", "response_loss", "clean_train_loss", "valid_loss")
TAKEN_BACK = "taken_back"  # how many numbers of λ went back after the epoch
DIAGNOSTICS = ("response_norm", "linearization_error", TAKEN_BACK, "seconds")
FORMAT = "fxstn-schedule-1"
Row = dict[str, float]


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
