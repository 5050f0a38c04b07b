"""Sentences of README and docs whose figures come from the files under benchmarks/results.

A text stands between <!-- text NAME --> and <!-- end --> in a page. `python -m benchmarks.tables` writes it anew, and
tests/test_figures.py fails where a page and its files differ.
"""

from __future__ import annotations

import functools
import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import batchnorm, hypergradient, kernels, on_device, refits, tuned, tuning
from benchmarks.paper import report as paper
from benchmarks.worth import report as worth
from benchmarks.worth.columns import COLUMNS
from benchmarks.worth.report import Entry
from fxstn.bilevel.settings import PAPER

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 128  # of lines of the pages
NETWORKS = ("resnet18", "resnet50", "vgg16", "alexnet", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "mlp")


@functools.cache
def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def entries(text: str) -> str:
    """Paragraphs as the entries of a list."""
    return "\n".join(f"- {paragraph(part)}".replace("\n", "\n  ") for part in text.split("\n\n"))


def span(values: Iterable[float], digits: int = 1) -> str:
    """From the least to the largest: "1.2 to 1.5", or one number where they read the same."""
    ordered = sorted(values)
    ends = [f"{value:.{digits}f}" for value in (ordered[0], ordered[-1])]
    return " to ".join(dict.fromkeys(ends))


def count(number: int, thing: str) -> str:
    """1 task, 2 tasks."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


# docs/results/worth.md, README.md


def _standing() -> dict[Entry, worth.Standing]:
    return worth.standings([*worth.rivals(), *worth.OURS], worth.everything(), "time")


def _seeds(results: worth.Results) -> str:
    """How many tasks have how many seeds of fxstn: "each has 3 seeds", or "7 have 3 seeds, and 7 have 1 seed"."""
    tasks = Counter(len(worth.OURS[1].losses(found, "time")) for found in results.values())
    if len(tasks) == 1:
        return f"each has {count(*tasks, 'seed')}"
    return ", and ".join(f"{tasks[n]} have {count(n, 'seed')}" for n in sorted(tasks, reverse=True))


def _missing() -> list[str]:
    """Columns without a cell in the first reading, by name."""
    measured = {entry.cell for entry in _standing()}
    return [worth.NAMES[column.makes[0]] for column in COLUMNS.values() if column.makes[0] not in measured]


def worth_summary() -> str:
    """The picture of the ranks, and what it says."""
    results = worth.everything()
    standing, last = (worth.standings(worth.in_the_end(), results, reading) for reading in ("time", "patience"))
    ranks, late = ({entry: statistics.mean(one.ranks) for entry, one in each.items()} for each in (standing, last))
    cells = dict.fromkeys(entry.cell.partition("-")[0] for entry, one in standing.items() if not one.count)
    names = [worth.NAMES[cell].partition(",")[0] for cell in cells]
    fewer = f"; {', '.join(names[:-1])} and {names[-1]} have fewer" if len(names) > 1 else ""
    high = Entry("ours", True, "high"), Entry("recipe", True, "high")
    pairs = [[statistics.mean(one.losses(found, "time").values()) for one in high] for found in results.values()]
    searches = {worth.NAMES[cell] for cell in ("asha", "pbt", "random-30")}
    searched = " Searches are not measured yet." if searches <= {*_missing()} else ""
    bought = " Random search takes 30 runs." if any(entry.cell == "random-30" for entry in ranks) else ""
    lowest = " and ".join(f"{entry} ({ranks[entry]:.1f})" for entry in list(ranks)[:2])
    alone, refit = (statistics.geometric_mean(_standing()[entry].times) for entry in worth.OURS)
    alt = f"Mean ranks of {len(ranks)} ways to train, over {len(results)} tasks; the lowest are {lowest}"
    return "\n\n".join(
        (
            paragraph(f"""
                The picture compares the test losses of {len(ranks)} ways to train, on {len(results)} small real tasks,
                from tables to text. "The recipe" has the usual strengths. "Refit" trains anew on all data, validation
                data too. ASHA, PBT, AdamCPR, TrivialAugment and "for as long" take as long as the tuned run, or four times
                as long, where they say so.{bought} The others are one run of a task's epochs.
            """),
            f"![{alt}](docs/start/ranks.png)",
            paragraph(f"""
                The times at the right include the refit, and are in multiples of plain training without one. Of the
                {refit:.1f} of fxstn the tuned run takes {alone:.1f}. These networks are small; a larger one takes less, as
                below. "4 × the time" is four times the tuned run alone, and the refit comes on top.
            """),
            paragraph(f"""
                The mean rank is {ranks[worth.OURS[1]]:.1f} for a tuned run with its refit,
                {ranks[Entry("recipe-long", True)]:.1f} for the recipe that trains as long with a refit,
                {ranks[Entry("cpr", True)]:.1f} for AdamCPR, {ranks[Entry("random-30", True)]:.1f} for random search, and
                {ranks[Entry("recipe-all", False)]:.1f} for the recipe on all data. From a start that is too strong, a
                tuned run with its refit ends below the start kept on {sum(ours < kept for ours, kept in pairs)} of
                {len(pairs)} tasks. Where each way trains until its validation loss stops falling, the ranks are
                {late[worth.OURS[1]]:.1f} for a tuned run, {late[Entry("recipe", True)]:.1f} for the recipe and
                {late[Entry("plain", True)]:.1f} for plain training, all with a refit. The tasks are small;
                {_seeds(results)}{fewer}.{searched}
            """),
        )
    )


def worth_state() -> str:
    """What is measured so far."""
    results = worth.everything()
    second = any(key.startswith("patience ") for found in results.values() for key in found)
    fewer = any(not one.count for one in _standing().values())
    spread = " With one seed nothing is known of the spread." if fewer else ""
    missing = "; ".join([*_missing(), *(() if second else ("the second reading",))])
    return paragraph(f"""
        Measured so far, on a busy machine: {len(results)} tasks; {_seeds(results)}.{spread}
        {f"Not measured yet: {missing}." if missing else ""} Columns that take as long as the tuned run took
        {_time_of_others(results):.2f} times its time.
    """)


def equal_time() -> str:
    """Which ways are the lowest, of those that take about as long as a tuned run."""
    results, standing = worth.everything(), _standing()
    ranks = {entry: statistics.mean(one.ranks) for entry, one in standing.items() if one.count}
    as_long = {entry: rank for entry, rank in ranks.items() if not entry.cell.endswith(("-4", "-30"))}
    refit, alone = (
        sorted((rank, str(entry)) for entry, rank in as_long.items() if entry.refit == refit) for refit in (True, False)
    )
    more = [str(entry) for entry, rank in ranks.items() if entry not in as_long and entry.refit and rank < refit[0][0]]
    return paragraph(f"""
        Of the ways that take no longer than a tuned run, {refit[0][1]} has the lowest mean rank ({refit[0][0]:.1f}; then
        {refit[1][1]}, {refit[1][0]:.1f}), and {alone[0][1]} of those without a refit ({alone[0][0]:.1f}; then
        {alone[1][1]}, {alone[1][0]:.1f}), on {len(results)} tasks. The table has the errors.
        {f"Lower still: {', '.join(more)}." if more else ""}
    """)


def _time_of_others(results: worth.Results) -> float:
    """The time of the columns that take as long as a tuned run, in multiples of that of the tuned run."""
    long, ours = Entry("recipe-long", False), worth.OURS[0]
    times = [
        [statistics.mean(cell["seconds"] for cell in entry.cells(found, "time").values()) for entry in (long, ours)]
        for found in results.values()
    ]
    return statistics.geometric_mean(other / own for other, own in times)


# docs/results/overhead.md


def _ratios(network: str) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in read(f"overhead-{network}-cpu")}


def tuned_run() -> str:
    processes = _ratios("resnet18")["schedule-default"]["processes"]
    return paragraph(f"""
        A tuned run of resnet18 took {span(processes)} times as long as plain training on a CPU.
    """)


def networks() -> str:
    rows = {name: _ratios(name) for name in NETWORKS}
    today = [rows[name]["schedule-default"]["processes"] for name in ("resnet18", "mlp")]
    tune = [ratio for name in ("resnet18", "mlp") for ratio in rows[name]["tune"]["processes"]]
    others = [row["schedule-default"]["ratio"] for name, row in rows.items() if name not in ("resnet18", "mlp")]
    jvp = [row["func-jvp"]["ratio"] / row["response"]["ratio"] for row in rows.values() if row["func-jvp"]["ratio"]]
    return paragraph(f"""
        The paper's schedule costs {span(row["schedule"]["ratio"] for row in rows.values())} times plain training. The
        default costs {span(today[0])} times on resnet18 and {span(today[1])} on the MLP, in three processes each, and the
        first steps of a loop with `fxstn.tune` {span(tune)} times. The other networks were measured with an older default,
        which costs {span(others)} times. A step by `torch.func.jvp` takes {span(jvp)} times as long as the emitted
        response step.
    """)


def launches() -> str:
    measured = read("kernels")["resnet18, 128 × 32², both"]
    plain, default = measured["plain"]["launches"], measured["default"]["launches"]
    return paragraph(f"""
        So an inner step of resnet18 launches {plain:.0f} kernels in plain training, and {default:.0f} with its share of
        the response and hyper steps once these have become regular.
    """)


def on_a_gpu() -> str:
    measured = read("gpu-cuda")
    one, graphs, mobile = (measured[name] for name in ("resnet18", "resnet18, graphs", "mobilenet_v3_small"))
    plain, kernels_of = one["times"]["plain"]["ms"], one["kernels"]["plain"]
    eager, replayed, large = (on_device.ratio(entry["times"], on_device.SHORT) for entry in (one, graphs, mobile))
    by_graphs = graphs["times"]["plain"]["ms"]
    device = [on_device.ratio(on_device.busy(entry), on_device.SHORT) for entry in (graphs, one)]
    mobile_plain = mobile["times"]["plain"]["ms"]
    version = one["torch"].partition("+")[0]
    return paragraph(f"""
        The device is one {one["device"]}, with torch {version}. A step of resnet18 has
        {kernels_of["kernels"]:.0f} kernels. The device needs {kernels_of["busy"]:.1f} ms for them, and the host
        {plain:.1f} ms to launch them: {1000 * plain / kernels_of["kernels"]:.0f} µs for each, where the prediction
        below has 5 for an operator. So what counts in eager mode is Python, and a tuned step takes
        {eager:.2f} times as long. In CUDA graphs it takes {by_graphs * replayed:.1f} ms,
        less than a plain step in eager mode, and {replayed:.2f} times as long as a plain one in graphs. Of the
        device's time it takes {span(device, 2)} times as much. Where the device decides, as in mobilenet_v3_small with
        {mobile["kernels"]["plain"]["busy"]:.1f} of {mobile_plain:.1f} ms, tuning takes {large:.2f} times
        as long as plain training; the prediction is {_predicted("mobilenet_v3_small, 128 × 224², both"):.2f}.
    """)


def _predicted(case: str) -> float:
    entry = kernels.read()[case]
    return kernels.averages(entry["default"], kernels.SHORT)["eager_ms"] / entry["plain"]["eager_ms"]


def rest_of_launches() -> str:
    rates, entries = kernels.rates(kernels.SHORT), kernels.read()
    units, papers = 1 + rates["response"] + rates["hyper"], 1 + (5 + 4 / PAPER["hyper"].train_steps) / 3
    mlp, resnet = (
        kernels.parts(entries[name]) for name in ("three_layers, 128 × 32², both", "resnet18, 128 × 32², both")
    )

    launches = sum(part[0] for part in mlp.values())

    def needed(parts: dict[str, tuple[float, float]]) -> tuple[float, float]:
        own = [part for name, part in parts.items() if name.endswith(kernels.NETWORK) or name == "optimizer"]
        return sum(launches for launches, _ in own), sum(share for _, share in own)

    return paragraph(f"""
        {rates["response"]:.3f} response steps and {rates["hyper"]:.3f} hyper steps for each inner step are {units:.2f} plain
        steps, where each costs as much as a plain one. A ratio of 1.5 leaves {1.5 - units:.2f} for all the rest, and one of
        1.4 leaves {1.4 - units:.2f}. The passes of the network and the optimizers take {needed(resnet)[1]:.2f} plain steps on
        resnet18 and {needed(mlp)[1]:.2f} on the MLP; weight decay takes {resnet["weight decay"][1]:.2f} and
        {mlp["weight decay"][1]:.2f} more. On the MLP these passes and optimizers are {needed(mlp)[0]:.0f} kernels for each
        inner step, and the masks {mlp["masks"][0]:.0f} more. Weight decay, Θᵀg, λ and ε bring this to {launches:.0f}: on so
        small a network a few numbers cost as many kernels as a layer. The paper's schedule takes {papers:.2f} plain steps by
        the count of products above, and a ratio of 3.3 leaves {3.3 - papers:.2f}.
    """)


def whole_runs() -> str:
    measured = read("whole-runs")
    return paragraph(f"""
        So a whole tuned run takes {span(one["ratio"] for one in measured.values())} times as long as plain training of
        these small networks. Each was run once, on a busy machine. Evaluations take what `hyper.evaluation_share` allows
        ([Resume and faults](../guides/runs.md#signs-of-trouble)). Statistics of batch norms take three batches in each
        epoch: much in the demo, whose epochs have six.
    """)


# docs/results/tuning.md


def _cells(task: str, method: str) -> list[Any]:
    results = read(f"tuning-{task}")
    return [cell for start in tuned.STARTS for cell in tuned.cells_of(results, method, start).values()]


def _difference(task: str, one: str, other: str) -> list[float]:
    """From each start: how much higher the mean validation loss of the first is, over the seeds that both have."""
    results = read(f"tuning-{task}")
    found = []
    for start in tuned.STARTS:
        a, b = (tuned.cells_of(results, method, start) for method in (one, other))
        if both := a.keys() & b.keys():
            found.append(statistics.mean(a[seed]["valid"] - b[seed]["valid"] for seed in both))
    return found


def tuning_outcome() -> str:
    """On how many tasks and starts a run ends below what a search finds in its time."""
    below = starts = 0
    for task in tuning.TASKS:
        results = read(f"tuning-{task}")
        random = tuned.searched(results, "random", tuned.default_seconds(results))
        for start in tuned.STARTS:
            ours = tuned.cells_of(results, "default", start)
            seeds = ours.keys() & random.keys()
            below += statistics.mean(ours[seed]["valid"] - random[seed]["valid"] for seed in seeds) < 0
            starts += 1
    return paragraph(f"""
        **What comes out.** On {below} of {starts} tasks × starts one run ends, in the mean over seeds, at a lower
        validation loss than random search finds in the same time. The lines below the tables say how much of the gap to a
        long search it closes.
    """)


def limits() -> str:
    def losses(method: str) -> str:
        results = read("tuning-cifar10-resnet18")
        return ", ".join(f"{results[f'{method} {start} 0']['valid']:.3f}" for start in tuned.STARTS)

    others = ("fashion-cnn", "digits-resnet18", "mnist-mlp", "diabetes-mlp", "concrete-mlp")
    gains = [gain for task in others for gain in _difference(task, "unlimited", "default")]
    return paragraph(f"""
        **Limited or not.** cifar10-resnet18 does not fit its data in 20 epochs. From the low, middle and high start, λ
        without limits ends at {losses("unlimited")} (seed 0). Untuned training ends at {losses("untuned")}, and the
        default at {losses("default")}. On the other tasks the limits change the loss by
        {span([-gain for gain in gains], 3)}.
    """)


def certainty() -> str:
    small = [
        d for task in ("mnist-mlp", "diabetes-mlp", "concrete-mlp") for d in _difference(task, "unlimited", "uncertain")
    ]
    return paragraph(f"""
        **Certain or not.** λ moves only where the sign of its gradient is certain. On the MLPs this changes the
        validation loss by {span(small, 3)} (unlimited less uncertain). It is part of the default because noise must not
        move λ where a network does not fit its data.
    """)


def every_step() -> str:
    tasks = [task for task in tuning.TASKS if _cells(task, "every-step")]
    return paragraph(f"""
        **A response step every fourth time or every time.** The validation loss of "every-step", which takes longer,
        differs by {span((d for task in tasks for d in _difference(task, "every-step", "default")), 3)} from the
        default's.
    """)


def gpt() -> str:
    results = read("gpt")
    losses: dict[str, list[float]] = {"fixed": [], "from": []}
    for key in dict.fromkeys(key.rsplit(" seed ", 1)[0] for key in results):
        cells = [cell for name, cell in results.items() if name.rsplit(" seed ", 1)[0] == key]
        losses[key.split()[0]].append(statistics.mean(cell["valid"] for cell in cells))
    return paragraph(f"""
        The best validation loss of the tuned runs is {span(losses["from"], 3)}, and that of the best fixed dropout
        {min(losses["fixed"]):.3f}. The runs start with an underfit network, so λ falls first. Later the dropout of the
        first attention's weights rises, and that of the last layer falls to nothing. The other sites get values that
        differ from start to start.
    """)


# docs/results/hypergradient.md


def retraining() -> str:
    found = hypergradient.compared(read("hypergradient"))
    epochs = list(hypergradient.EPOCHS)

    def cosines(name: str, until: int) -> str:
        return span(found[name][0].mean(0)[: epochs.index(until) + 1].tolist(), 2)

    def sizes(name: str, until: int) -> str:
        return span(found[name][1].median(0).values[: epochs.index(until) + 1].tolist(), 2)

    true = torch.tensor(read("hypergradient")["truth"])
    horizon = torch.nn.functional.cosine_similarity(true[:1], true[-1:], dim=-1).item()
    return entries(f"""
        **The default.** Up to epoch 80 its cosine with the truth is {cosines("default", 80)}, and its size
        {sizes("default", 80)} of the truth's.

        **The paper's response and schedule.** The size is {sizes("paper", 160)} of the truth's: R and U both have to be
        learned, and each step of one is in proportion to the other. In short runs this error mattered most.

        **Scaling of units.** Up to epoch 20 *units* has a cosine of {cosines("units", 20)}: scaling says what there is
        to say. Long after the validation loss has turned it no longer does. Neither does the exact Hessian then.

        **A smaller σ.** It makes Θ noisier: the cosine is {cosines("narrow", 80)} up to epoch 80.

        **A short horizon.** The truth at epoch 5 has a cosine of {horizon:.2f} with that at epoch 160. So a look further
        ahead would change little. Exact implicit differentiation looks ahead to convergence, and is
        {span(found["implicit"][1].median(0).values.tolist(), 0)} times too large.

        **One validation batch.** 128 images give a cosine of {cosines("batch", 80)}: nearly that of all 1,000.
    """)


def batch_norms() -> str:
    found = read("batchnorm")["0.2"]
    true = torch.tensor(found["truth"]).mean(1)
    signs = {name: (torch.tensor(found[name]).mean(1) * true).sum(1) > 0 for name in found}

    def until(name: str) -> str:
        right = [epoch for epoch, sign in zip(batchnorm.EPOCHS, signs[name].tolist(), strict=True) if sign]
        return f"up to epoch {max(right)}"

    return paragraph(f"""
        Retraining asks for less dropout at every epoch of the table. The gradient of the validation loss points the same
        way {until("batch")} with one ε for the batch, and {until("example")} with one per example. The corrected one does
        so {until("batch, corrected")}, and then looks too far ahead. But from starts that are too strong, a network with
        batch norms does not recover without the correction, so it stays in the default.
    """)


def noise() -> str:
    found = read("controls")
    sizes = {start: [v for key, v in found.items() if key.split()[1:] == [start, "0.01"]] for start in ("low", "high")}
    return paragraph(f"""
        From the high start, the hypergradient of the default rate is {span(sizes["high"])} times the size of noise. From
        the low one, where the networks overfit, it is {span(sizes["low"])} times. A smaller rate of Θ has less noise. In
        trials it did not find better values of λ, and was late where many values had to move far.
    """)


# docs/results/paper.md


def linear_regression() -> str:
    runs: dict[str, list[float]] = {}
    for kind in paper.linear.KINDS:
        for key, cell in paper.read(paper.FOLDER / f"linear-{kind}.json").items():
            name, method, _, scale, _ = key.split()
            if name != paper.APART and scale == "1.0":
                runs.setdefault(method, []).append(cell["excess"])
    every = [excess for values in runs.values() for excess in values]
    far, ours = (sum(excess > 0.01 for excess in values) for values in (every, runs["delta"]))
    return paragraph(f"""
        **What comes out.** On all sets but naval-propulsion-plant, {len(every) - far} of {len(every)} runs end within 1 %
        of the exact optimum, and {len(runs["delta"]) - ours} of {len(runs["delta"])} of Δ-STN. The runs that do not begin
        far away from a best λ near 0, and are still on their way. The features of naval-propulsion-plant are nearly
        collinear. Gradient steps do not reach w*(λ) along such directions in the time, so that λ stays where it makes no
        difference.
    """)


def _loss(row: str, method: str) -> float:
    cells = paper.read(paper.FOLDER / f"small-{row}.json")
    values = [value for key, value in cells.items() if key.split()[0] == method]
    return statistics.mean(min(c["valid"] for c in (v if isinstance(v, list) else [v])) for v in values)


def paper_mnist() -> str:
    return paragraph(f"""
        With the defaults Δ-STN ends at a validation loss of {_loss("mnist", "default"):.3f}, random search at
        {_loss("mnist", "random"):.3f}, and the start kept at {_loss("mnist", "untuned"):.3f}. With the paper's settings
        centred STN and Δ-STN hardly move λ in so short a run: Θ is learned too slowly ([the
        hypergradient](hypergradient.md)). STN does move λ, evenly, as it would have moved what does nothing (above). Here
        that is the right way.
    """)


def paper_fmnist() -> str:
    methods = ("untuned", "stn", "centered", "delta", "default")
    return paragraph(f"""
        All runs that begin at the paper's start end within the spread of each other, at mean validation losses of
        {span((_loss("fmnist", method) for method in methods), 3)}. Random search ends at {_loss("fmnist", "random"):.3f}:
        it draws from the whole ranges, where most strengths hold a network back that has 40 epochs.
    """)


def paper_cifar() -> str:
    kept, ours, delta, random = (_loss("cifar10-resnet18", m) for m in ("untuned", "default", "delta", "random"))
    return paragraph(f"""
        One seed. Random search ends at {random:.3f}: with 19 strengths from the whole ranges hardly a draw lets a network
        learn anything in 15 epochs. The start kept ends at {kept:.3f}, Δ-STN with the paper's settings at {delta:.3f},
        and with the defaults at {ours:.3f}. The paper's settings have time for eight epochs, five of them warm-up, so λ
        hardly moves. One seed does not tell how much of the gain is luck. [Against searches](tuning.md) has longer runs.
    """)


def paper_plain_network(row: str) -> str:
    """Of a row without norms."""
    methods = ("untuned", "default", "delta", "centered", "random")
    kept, ours, delta, centred, random = (_loss(row, method) for method in methods)
    return paragraph(f"""
        One seed. The start kept ends at {kept:.3f}, Δ-STN with the defaults at {ours:.3f}, with the paper's settings at
        {delta:.3f}, centred STN at {centred:.3f}, and random search at {random:.3f}.
    """)


def paper_robustness() -> str:
    found = paper.robustness("fmnist", "small")
    spreads = []
    for method in paper.linear.METHODS:
        losses = [statistics.mean(v) for (m, start, _), v in found.items() if m == method and start < 0.9]
        spreads.append(max(losses) - min(losses))
    return paragraph(f"""
        The paper finds Δ-STN the most robust of the three (appendix I). Here, from dropout rates of 0.05 to 0.6 and σ of
        0.1 to 2, the validation losses of a method differ by {span(spreads, 3)}. From dropout 0.9 no method trains: with
        centred STN and Δ-STN the network learns nothing, and with STN the first epoch diverges.
    """)


# docs/guides


def refit_values() -> str:
    def ratio(kind: str, group: str) -> str:
        ratios = [one[group][kind] / one[group]["best"] for one in read("refits-recorded").values()]
        return refits.geometric_mean(ratios, 3, "{} (± {})")

    usual, high = "patience recipe", "time high"
    return paragraph(f"""
        In runs from the usual recipe that go on until the validation loss stops falling, the mean over the second half gives
        {ratio("late", usual)} times the loss of the best epoch's values. In short runs from a start that is too strong it
        gives {ratio("late", high)}. The weaker of both values of each number gives {ratio("found", usual)} and
        {ratio("found", high)}. So a refit takes these. The rule was chosen on earlier runs of
        the same tasks.
    """)


def refit_kinds() -> str:
    cells = [one["scores"] for one in read("refits-lengths").values()]

    def ratio(kind: str) -> str:
        return refits.geometric_mean([one[kind][0] / one["best"][0] for one in cells], 2, "{} (± {})")

    lower = sum(one["best"][0] < one["tuned"][0] for one in cells)
    return paragraph(f"""
        The refit has a lower test loss than the tuned run in {lower} of {len(cells)} runs: the data held out are not
        lost. In multiples of its loss, with standard errors, the values of the last epoch give {ratio("last")}, and the
        start kept {ratio("start")}. As many steps in place of as many passes give {ratio("steps")}, and as many epochs as
        the whole run (`epochs=`) {ratio("whole")}. So a refit takes as many epochs as the best one had. In so few runs other
        means of the values do not differ by more than their error.
    """)


def detector() -> str:
    results = read("detection")
    times = [
        tuned["seconds"] / kept["seconds"]
        for tuned, kept in zip(*(results[k] for k in ("tuned", "start kept")), strict=True)
    ]
    higher = sum(t["test AP"] > k["test AP"] for t, k in zip(results["tuned"], results["start kept"], strict=True))
    return paragraph(f"""
        The losses are alike, within the range of the seeds. AP is higher in {higher} of {count(len(times), "seed")}. The
        tuned run took {statistics.mean(times):.2f} times as long.
    """)


TEXTS: dict[str, Callable[[], str]] = {
    "worth-summary": worth_summary, "worth-state": worth_state, "equal-time": equal_time, "tuned-run": tuned_run,
    "networks": networks,
    "launches": launches, "gpu-steps": on_a_gpu, "rest-of-launches": rest_of_launches,
    "whole-runs": whole_runs, "tuning-outcome": tuning_outcome, "limits": limits, "certainty": certainty,
    "every-step": every_step, "gpt-losses": gpt, "retraining": retraining,
    "batch-norms": batch_norms, "noise": noise, "linear-regression": linear_regression,
    "paper-mnist": paper_mnist, "paper-fmnist": paper_fmnist,
    "paper-cifar": paper_cifar, "paper-alexnet": functools.partial(paper_plain_network, "cifar10-alexnet"),
    "paper-vgg": functools.partial(paper_plain_network, "cifar10-vgg16"), "paper-robustness": paper_robustness,
    "refit-kinds": refit_kinds, "refit-values": refit_values, "detector": detector,
}  # fmt: skip
