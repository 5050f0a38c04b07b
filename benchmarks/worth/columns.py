"""The columns of the table, by name: what each does, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.worth import cells
from benchmarks.worth.cells import LONGEST, Cell, Trial, key_of
from benchmarks.worth.implicit import implicit
from benchmarks.worth.ours import tuned
from benchmarks.worth.searches import asha, pbt, random_search
from benchmarks.worth.tasks import STARTS, TASKS
from benchmarks.worth.training import Limits
from benchmarks.worth.usual import adam_cpr, plain, recipe, recipe_on_all, trivial_augment


@dataclass(frozen=True)
class Column:
    """run(trial) → {name of a cell: the cell}.

    makes: the names of its cells. starts: those that it is run from. images: only for tasks of images.
    long: whether it trains for the time of our run, in the reading of equal time.
    readings: in which it is run.
    """

    says: str
    run: Callable[[Trial], dict[str, Cell]]
    makes: tuple[str, ...]
    starts: tuple[str, ...] = ("recipe",)
    images: bool = False
    long: bool = False
    readings: tuple[str, ...] = cells.READINGS


ONCE = ("time",)
COLUMNS: dict[str, Column] = {
    "plain": Column("no regularisation", plain, ("plain",)),
    "recipe": Column("the start kept", recipe, ("recipe",), STARTS),
    "recipe-all": Column("the recipe on all data, a task's epochs", recipe_on_all, ("recipe-all",), readings=ONCE),
    "ours": Column("one tuned run", tuned, ("ours",), STARTS),
    "plain-long": Column(
        "plain, for as long", partial(plain, name="plain-long"), ("plain-long",), long=True, readings=ONCE
    ),
    "recipe-long": Column(
        "the recipe, for as long", partial(recipe, name="recipe-long"), ("recipe-long",), long=True,
        readings=ONCE,
    ),
    "trivial": Column("TrivialAugment beside the recipe", trivial_augment, ("trivial",), images=True, long=True),
    "cpr": Column("AdamCPR, the recipe's dropout", adam_cpr, ("cpr",), long=True),
    "implicit": Column("implicit differentiation in one pass", implicit, ("implicit",)),
    "asha": Column("ASHA at the same and at four times the time", asha, ("asha", "asha-4")),
    "pbt": Column("PBT, likewise", pbt, ("pbt", "pbt-4")),
    "random": Column("random search, 30 runs", random_search, ("random-30",), readings=ONCE),
}  # fmt: skip


class CellIsMissing(LookupError):
    """A cell whose time or length another one takes."""


def needed(known: Mapping[str, Cell], key: str) -> Cell:
    if key not in known:
        raise CellIsMissing(
            f"it takes its time or length from the cell {key!r}, which is not there; run that column first"
        )
    return known[key]


def limits_of(task: str, reading: str, column: Column, known: Mapping[str, Cell], seed: int) -> tuple[Limits, float]:
    """(limits of a run, seconds of a search). known: the cells of the task so far.

    Equal time is that of our run from the recipe, without the refit. In the other reading a run ends when its validation loss
    has not fallen for half of the task's epochs, and a trial of a search has as many epochs as the recipe took.

    Raises CellIsMissing where the cells that say so are not there.
    """
    epochs, budget = TASKS[task].epochs, 0.0
    search = column.makes in (("asha", "asha-4"), ("pbt", "pbt-4"))
    if search or (column.long and reading == "time"):
        budget = needed(known, key_of(reading, "ours", "recipe", seed))["seconds"]
    if reading == "time":
        return (Limits(100 * epochs, budget) if column.long else Limits(epochs)), budget
    if search:
        return Limits(needed(known, key_of(reading, "recipe", "recipe", seed))["epochs"]), budget
    return Limits(LONGEST * epochs, patience=max(5, epochs // 2)), budget


def missing(task: str, reading: str, name: str, start: str, seed: int, known: Mapping[str, Cell]) -> bool:
    """Whether a column is meant for a task, and has not been run."""
    column = COLUMNS[name]
    meant = reading in column.readings and start in column.starts and (TASKS[task].images or not column.images)
    return meant and any(key_of(reading, cell, start, seed) not in known for cell in column.makes)


def run(task: str, reading: str, name: str, start: str, seed: int) -> None:
    """Run a column and write its cells. Raises CellIsMissing, and the errors of the column."""
    column, known = COLUMNS[name], cells.read(task)
    limits, budget = limits_of(task, reading, column, known, seed)
    told = {"budget": budget} if budget else {}
    made = column.run(Trial(TASKS[task], seed, start, limits, budget))
    cells.add(task, {key_of(reading, cell, start, seed): value | told for cell, value in made.items()})
