"""The tables of docs/results/worth.md, from the cells alone. No cell is left out.

An entry is a column, as it ended or trained anew ("refit"). Losses are those of the test set.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tabulate import tabulate

from benchmarks.worth import cells
from benchmarks.worth.cells import READINGS, Cell
from benchmarks.worth.columns import COLUMNS
from benchmarks.worth.tasks import STARTS, TASKS

Results = Mapping[str, Mapping[str, Cell]]  # {task: {key: cell}}
Losses = dict[int, float]  # by seed
NAMES = {
    "plain": "plain", "recipe": "the recipe", "recipe-all": "the recipe on all data", "plain-long": "plain, for as long",
    "recipe-long": "the recipe, for as long", "trivial": "TrivialAugment", "cpr": "AdamCPR", "implicit": "implicit, one pass",
    "asha": "ASHA", "asha-4": "ASHA, 4 × the time", "pbt": "PBT", "pbt-4": "PBT, 4 × the time",
    "random-30": "random search × 30", "ours": "fxstn",
}  # fmt: skip
# How often the mean of three normal numbers around zero is above their deviation: Student's t, of two degrees, above √3.
CHANCE = (1 - math.sqrt(3 / 5)) / 2
NOTHING = "Nothing is measured yet."
MARKDOWN = partial(tabulate, tablefmt="github", disable_numparse=True)


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: the cells of one name and start, as they ended or refitted."""

    cell: str
    refit: bool
    start: str = "recipe"

    def __str__(self) -> str:
        start = "" if self.start == "recipe" else f" from {self.start}"
        return f"{NAMES[self.cell]}{start}{', refit' if self.refit else ''}"

    def cells(self, results: Mapping[str, Cell], reading: str) -> dict[int, Cell]:
        """{seed: cell} of a task; with the refit's loss, metric and the time of both where it is one."""
        found = {}
        for key, cell in results.items():
            if key.split()[:3] == [reading, self.cell, self.start] and (not self.refit or "refit" in cell):
                seconds = cell["seconds"] + (cell["refit"]["seconds"] if self.refit else 0.0)
                found[int(key.split()[3])] = cell | (cell["refit"] if self.refit else {}) | {"seconds": seconds}
        return dict(sorted(found.items()))

    def losses(self, results: Mapping[str, Cell], reading: str) -> Losses:
        return {seed: cell["test"] for seed, cell in self.cells(results, reading).items()}


def rivals() -> list[Entry]:
    """All entries that do not tune by fxstn."""
    return [Entry(cell, refit) for column in COLUMNS.values() for cell in column.makes if cell != "ours"
            for refit in (False, True)]  # fmt: skip


OURS = [Entry("ours", False), Entry("ours", True)]


def in_the_end() -> list[Entry]:
    """The entries that train on all data at last, as one would use them."""
    return [entry for entry in [*rivals(), *OURS] if entry.refit or entry.cell == "recipe-all"]


def difference(losses: Losses, others: Losses) -> tuple[float, float]:
    """Mean and standard deviation over the seeds that both have, of how much higher the first is; deviation 0 of one seed.

    NaN where they have none in common."""
    values = [loss - others[seed] for seed, loss in losses.items() if seed in others]
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def within(losses: Losses, others: Losses) -> bool:
    """Whether the first is at most as high as the other, or higher by no more than the deviation of the difference."""
    mean, deviation = difference(losses, others)
    return mean <= deviation


def lowest(entries: Sequence[Entry], results: Mapping[str, Cell], reading: str) -> Entry | None:
    """The entry with the lowest mean test loss, of those with the most seeds."""
    means = {entry: statistics.mean(losses.values()) for entry, losses in whole(entries, results, reading).items()}
    return min(means, key=means.__getitem__, default=None)


def whole(entries: Sequence[Entry], results: Mapping[str, Cell], reading: str) -> dict[Entry, Losses]:
    """Those with the most seeds: of the others too little is known of the spread to call one the lowest."""
    found = {entry: losses for entry in entries if (losses := entry.losses(results, reading))}
    most = max(map(len, found.values()), default=0)
    return {entry: losses for entry, losses in found.items() if len(losses) == most}


def ranks(entries: Sequence[Entry], results: Mapping[str, Cell], reading: str) -> dict[Entry, float]:
    """{entry: its rank by test loss}: 1, and the share of seeds in which another is lower, for each other entry.

    Each two are compared on the seeds that both have, so that the number of entries does not depend on the seed. Equal losses
    share a rank. With the same seeds everywhere it is the mean rank.
    """
    by_entry = {entry: losses for entry in entries if (losses := entry.losses(results, reading))}
    return {
        entry: 1 + sum(_share_below(losses, own) for other, losses in by_entry.items() if other != entry)
        for entry, own in by_entry.items()
    }


def _share_below(losses: Losses, others: Losses) -> float:
    """The share of common seeds in which the first is lower; an equal loss is half a seed. Zero without a common seed."""
    pairs = [(losses[seed], others[seed]) for seed in losses if seed in others]
    return statistics.mean((a < b) + (a == b) / 2 for a, b in pairs) if pairs else 0.0


def mean_and_error(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def share(hits: int, count: int) -> str:
    """hits of count, and its standard deviation if the tasks were drawn."""
    return f"{hits} of {count} ± {math.sqrt(hits * (count - hits) / count):.1f}" if count else "–"


@dataclass(frozen=True)
class Standing:
    """How an entry stands on the tasks that it has: its ranks, how often it is lowest, or within the spread of the lowest.

    count: the tasks on which it has as many seeds as any other, which alone can be counted.
    """

    ranks: list[float]
    count: int
    wins: int
    near: int
    times: list[float]
    runs: int

    def cells(self) -> list[str]:
        count, times = self.count, self.times
        return [mean_and_error(self.ranks), share(self.wins, count), share(self.near, count),
                f"{statistics.geometric_mean(times):.1f}" if times else "–", str(self.runs)]  # fmt: skip


def standings(entries: Sequence[Entry], results: Results, reading: str) -> dict[Entry, Standing]:
    """Of the entries that have cells, in the order of their mean ranks among each other."""
    by_task = {task: ranks(entries, found, reading) for task, found in results.items()}
    full = {task: whole(entries, found, reading) for task, found in results.items()}
    best = {task: lowest(entries, found, reading) for task, found in results.items()}
    result = {}
    for entry in entries:
        tasks = [task for task in results if entry in by_task[task]]
        losses = {task: entry.losses(results[task], reading) for task in tasks}
        counted = [task for task in tasks if entry in full[task]]
        near = [within(losses[task], full[task][best[task]]) for task in counted]
        times = [ratio for task in tasks if (ratio := _time(entry, results[task], reading)) is not None]
        if tasks:
            wins, runs = sum(best[task] == entry for task in tasks), sum(map(len, losses.values()))
            ranked = [by_task[task][entry] for task in tasks]
            result[entry] = Standing(ranked, len(counted), wins, sum(near), times, runs)
    return dict(sorted(result.items(), key=lambda pair: statistics.mean(pair[1].ranks)))


def summary(results: Results, reading: str) -> str:
    """A line for each entry: mean rank, how often it is lowest or within the spread of the lowest, and its time."""
    lines = [[str(entry), *one.cells()] for entry, one in standings([*rivals(), *OURS], results, reading).items()]
    headers = ["way to train", "mean rank", "lowest", "lowest or within the spread", "time / plain", "runs"]
    return MARKDOWN(lines, headers) if lines else NOTHING


def overview(results: Results) -> str:
    """A line for each column as one would use it in the end, trained on all data: its standing in both readings."""
    both = [standings(in_the_end(), results, reading) for reading in READINGS]
    lines = []
    for entry in dict.fromkeys([*both[0], *both[1]]):
        cells = [part[entry].cells() if entry in part else ["–"] * 4 for part in both]
        lines.append([str(entry), *(cell for part in cells for cell in (part[0], part[2], part[3]))])
    headers = ["trained anew on all data", "mean rank, equal time", "within the spread of the lowest", "time / plain",
               "mean rank, until it stops falling", "within the spread of the lowest", "time / plain"]  # fmt: skip
    return MARKDOWN(lines, headers) if lines else NOTHING


def _time(entry: Entry, found: Mapping[str, Cell], reading: str) -> float | None:
    """The entry's seconds over those of plain training for a task's epochs, of the seeds that have both."""
    own, plain = entry.cells(found, reading), Entry("plain", False).cells(found, "time")
    ratios = [cell["seconds"] / plain[seed]["seconds"] for seed, cell in own.items() if seed in plain]
    return statistics.geometric_mean(ratios) if ratios else None


def spread_of(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def of_task(found: Mapping[str, Cell], reading: str, metric: str) -> str:
    """A line for each column and start: test loss and metric as it ended and refitted, times, epochs."""
    lines = []
    names = [(cell, start) for column in COLUMNS.values() for cell in column.makes for start in column.starts]
    for cell, start in names:
        ended, refit = (Entry(cell, again, start).cells(found, reading) for again in (False, True))
        if not ended:
            continue
        losses = [spread_of([one["test"] for one in part.values()]) if part else "" for part in (ended, refit)]
        metrics = [spread_of([one["metric"] for one in part.values()]) if part else "" for part in (ended, refit)]
        times = [
            f"{statistics.mean(one['seconds'] for one in part.values()):.1f}" if part else "" for part in (ended, refit)
        ]
        length = f"{statistics.mean(one['epochs'] for one in ended.values()):.0f}"
        lines.append([str(Entry(cell, False, start)), *losses, *metrics, *times, length, len(ended)])
    headers = ["way to train", "test loss", "refit", metric, "refit", "seconds", "with refit", "epochs", "seeds"]
    return MARKDOWN(lines, headers)


def tasks(results: Results) -> str:
    """Every task with its tables."""
    parts = []
    for task, found in results.items():
        parts.append(f"### {task}\n\n{TASKS[task].says[0].upper()}{TASKS[task].says[1:]}.")
        for reading, what in zip(READINGS, ("Equal time", "Until the validation loss stops falling"), strict=True):
            if any(key.startswith(f"{reading} ") for key in found):
                parts.append(f"{what}:\n\n{of_task(found, reading, TASKS[task].metric)}")
    return "\n\n".join(parts) + "\n"


def against_recipe(results: Results, reading: str) -> str:
    """A line for each task: ours, refitted, less the recipe on all data, which trains for as many epochs as its best one had,
    or, in the reading of equal time, for the task's epochs; whichever is lower."""
    lines, verdicts = [], []
    all_data = [Entry("recipe", True), Entry("recipe-all", False)]
    for task, found in results.items():
        other, ours = lowest(all_data, found, reading), OURS[1].losses(found, reading)
        if other is None or not ours:
            continue
        kept = other.losses(found, reading)
        mean, deviation = difference(ours, kept)
        verdicts.append("lower" if mean < -deviation else "within the spread" if mean <= deviation else "higher")
        lines.append([task, spread_of(list(ours.values())), spread_of(list(kept.values())), f"{mean:+.3f} ± {deviation:.3f}",
                      verdicts[-1]])  # fmt: skip
    if not lines:
        return NOTHING
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("lower", "within the spread", "higher"))
    return MARKDOWN(lines, ["task", "fxstn, refit", "the recipe on all data", "difference", counts])


def starts(results: Results, reading: str) -> str:
    """A line for each task: ours, refitted, from each start, beside the start kept on all data."""
    lines, settled, near, harmed, count = [], 0, 0, 0, 0
    for task, found in results.items():
        losses = [Entry("ours", True, start).losses(found, reading) for start in STARTS]
        if not all(losses):
            continue
        kept = [Entry("recipe", True, start).losses(found, reading) for start in STARTS]
        means = [statistics.mean(one.values()) for one in losses]
        seeds = [statistics.stdev(one.values()) for one in losses if len(one) > 1]
        over_starts, over_seeds = statistics.stdev(means), statistics.mean(seeds) if seeds else 0.0
        settled += over_starts <= over_seeds
        other = lowest(rivals(), found, reading)
        near += sum(other is not None and within(one, other.losses(found, reading)) for one in losses)
        harmed += sum(not within(one, two) for one, two in zip(losses, kept, strict=True) if two)
        count += 1
        lines.append([task, " / ".join(f"{mean:.3f}" for mean in means),
                      " / ".join(f"{statistics.mean(one.values()):.3f}" if one else "–" for one in kept),
                      f"{over_starts:.3f}", f"{over_seeds:.3f}"])  # fmt: skip
    headers = [
        "task",
        "fxstn, refit: low / recipe / high start",
        "the start kept, refit",
        "deviation over starts",
        "over seeds",
    ]
    said = (
        f"\n\nThe deviation over starts is at most that over seeds on {share(settled, count)} tasks. fxstn with a refit is "
        f"lower than every other column, or within the spread of the lowest, on {share(near, 3 * count)} tasks × starts. It is "
        f"higher than the start kept, by more than the spread, on {share(harmed, 3 * count)}. Of two ways that are equally "
        f"good one is so by chance on {100 * CHANCE:.0f} % of what has three seeds: {3 * count * CHANCE:.1f} of {3 * count}."
    )
    return MARKDOWN(lines, headers) + said if count else NOTHING


def everything() -> Results:
    """The cells of all tasks that have some."""
    return {task: found for task in TASKS if (found := cells.read(task))}


def text() -> str:
    """All tables, for a terminal."""
    results = everything()
    parts = [tasks(results)]
    for reading in READINGS:
        parts += [
            f"## {reading}",
            summary(results, reading),
            against_recipe(results, reading),
            starts(results, reading),
        ]
    return "\n\n".join(parts)
