"""Write the tables of README.md and of pages under docs, and docs/results/scaling.png, from the files under benchmarks/results.

    python -m benchmarks.tables

A table stands between <!-- table NAME --> and <!-- end -->, sentences between <!-- text NAME --> and <!-- end -->; what is
between is replaced.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import (
    batchnorm,
    controls,
    gpt,
    host,
    hypergradient,
    kernels,
    norms,
    on_device,
    pictures,
    ptb,
    refits,
    replay,
    tuned,
    tuning,
    whole_runs,
)
from benchmarks.overhead import NETWORKS
from benchmarks.paper import report as paper
from benchmarks.sentences import TEXTS, read
from benchmarks.worth import report as worth
from benchmarks.worth.cells import READINGS
from fxstn.bilevel.cadence import steps_of_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- (?:table|text) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MEANING = {
    "plain": "plain training, fixed dropout at the same places",
    "general": "general step: the same training, conditioned on λ",
    "response": "response step, by the emitted tangent",
    "schedule": "whole schedule of the paper, per inner step",
    "schedule-default": "whole schedule, the default",
    "func-jvp": "response step by `torch.func.jvp`, ε per example",
    "func-jvp-batch": "response step by `torch.func.jvp`, one ε per batch",
}


def overhead() -> str:
    rows = {row["variant"]: row for row in json.loads((RESULTS / "overhead-resnet18-cpu.json").read_text())}
    peaks = {v: "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}" for v, row in rows.items()}
    cells = [(what, f"{rows[v]['ratio']:.2f}", peaks[v]) for v, what in MEANING.items()]
    headers = ["resnet18, batch 64, 32×32, 2 CPU threads", "time / plain", "peak MB"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def demo() -> str:
    results = json.loads((RESULTS / "demo.json").read_text())
    columns = ["valid loss", "valid accuracy", "test loss", "test accuracy", "seconds"]

    def mean(runs: list[dict[str, float]], column: str) -> str:
        """Nothing where a run does not have it: a refit has no validation data."""
        digits = 1 if column == "seconds" else 3
        return f"{statistics.mean(run[column] for run in runs):.{digits}f}" if column in runs[0] else ""

    cells = [[name, *(mean(runs, column) for column in columns)] for name, runs in results.items()]
    return tabulate(
        cells, [f"mean of {len(results['tuned'])} seeds", *columns], tablefmt="github", disable_numparse=True
    )


def detection() -> str:
    """Both runs of examples/detection.py: means, and the range of the seeds."""
    results, columns = json.loads((RESULTS / "detection.json").read_text()), ("valid loss", "test loss", "test AP")

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    rows = [[name, *(cell([run[column] for run in runs]) for column in columns)] for name, runs in results.items()]
    return tabulate(
        rows, [f"mean of {len(results['tuned'])} seeds", *columns], tablefmt="github", disable_numparse=True
    )


def suite() -> str:
    """Every network of the suite: ratios to plain training, and peak memory as a ratio too."""
    columns = ["general", "response", "schedule", "schedule-default", "func-jvp", "func-jvp-batch", "double-backward"]
    cells = []
    for name, (_, batch, image) in NETWORKS.items():
        rows = {row["variant"]: row for row in json.loads((RESULTS / f"overhead-{name}-cpu.json").read_text())}
        ratios = [f"{rows[c]['ratio']:.2f}" if rows[c]["ratio"] is not None else "fails" for c in columns]
        peaks = [f"{rows[c]['peak_mb'] / rows['plain']['peak_mb']:.2f}" for c in ("schedule", "schedule-default")]
        cells.append([name, f"{batch} × {image}²", f"{rows['plain']['step_ms']:.0f}", *ratios, *peaks])
    headers = ["network", "batch × image", "plain, ms", *columns, "memory, schedule", "memory, default"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def peer() -> str:
    rows = json.loads((RESULTS / "peer-cpu.json").read_text())["rows"]
    cells = [(row["variant"], f"{row['ratio']:.2f}") for row in rows]
    return tabulate(cells, ["one weight decay per layer of resnet18", "time / plain"], tablefmt="github")


def augment() -> str:
    measured = json.loads((RESULTS / "augment-cpu.json").read_text())
    cells = [
        (row["way"], f"{row['ms']:.1f}", f"{row['times fxstn']:.2f}", f"{row['of a step']:.2f}")
        for row in measured["rows"]
    ]
    headers = [f"{measured['batch']} images of 32×32", "ms", "time / fxstn", "time / a training step of resnet18"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def language() -> str:
    rows = json.loads((RESULTS / "language-cpu.json").read_text())
    cells = [(row["variant"], f"{row['step_ms']:.0f}", f"{row['ratio']:.2f}") for row in rows]
    first = rows[0]
    sizes = f"2 × {first['width']} units, batch {first['batch']}, windows of {first['length']}, {first['words']} words"
    what = f"{sizes}, {first['threads']} CPU threads"
    return tabulate(cells, [what, "ms", "time / plain"], tablefmt="github", disable_numparse=True)


def _tuned() -> dict[str, dict[str, Any]]:
    """{task: its results}, of those in which the default settings ran."""
    found = {task: json.loads(tuned.path_of(task).read_text()) for task in tuning.TASKS if tuned.path_of(task).exists()}
    return {task: results for task, results in found.items() if any(key.startswith("default") for key in results)}


def tuning_overview() -> str:
    return tuned.overview(_tuned())


def tasks() -> str:
    """Every task of the tuning benchmark, with a heading."""
    parts = (f"### {task}\n\n{tuned.table(found)}\n\n{tuned.gap_closed(found)}." for task, found in _tuned().items())
    return "\n\n".join(parts) + "\n"


def hypergradients() -> str:
    return hypergradient.table(json.loads(hypergradient.RESULTS.read_text()))


def normed() -> str:
    """At the rate that the page speaks of."""
    return batchnorm.table(json.loads(batchnorm.PATH.read_text())["0.2"])


def statistics_of_norms() -> str:
    return norms.table(json.loads(norms.PATH.read_text()))


def hosts() -> str:
    return host.table(json.loads(host.PATH.read_text()))


def noise() -> str:
    return controls.table(json.loads(controls.PATH.read_text()))


def plot_scaling(path: Path) -> None:
    """One panel per axis: ratios to plain training."""
    import matplotlib.pyplot as plt

    points = json.loads((RESULTS / "scaling-cpu.json").read_text())
    figure, panels = plt.subplots(1, len(points), figsize=(3.2 * len(points), 3.2), sharey=True, layout="constrained")
    for panel, (axis, values) in zip(panels, points.items(), strict=True):
        labels = [str(point["at"]).removeprefix("resnet") for point in values]
        for variant in ("response", "schedule", "schedule-default"):
            panel.plot(labels, [point[variant] for point in values], marker="o", label=variant)
        panel.set_xlabel(f"{axis} (resnet)" if axis == "depth" else axis)
        panel.axhline(1, color="grey", linewidth=0.8)
    panels[0].set_ylim(0, 1.08 * panels[0].get_ylim()[1])  # shared by all
    panels[0].set_ylabel("time per step / plain training")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def penn_treebank() -> str:
    return ptb.table(json.loads(ptb.FILE.read_text()))


def replayed() -> str:
    return replay.table(json.loads(replay.FILE.read_text()))


def whole() -> str:
    return whole_runs.table(json.loads(whole_runs.FILE.read_text()))


def small_gpt() -> str:
    return gpt.table(json.loads(gpt.FILE.read_text()))


def starts() -> str:
    return pictures.table(json.loads(pictures.FILE.read_text()))


def units() -> str:
    """Response and hyper steps of runs of the default, and their work in units of one forward: see docs/results/overhead.md."""
    cells = []
    for steps in (250, 1_000, 10_000, 100_000):
        response, hyper = steps_of_run(steps)
        cells.append([f"{steps:,}", f"{response:,}", f"{hyper:,}", f"{1 + (response + hyper) / steps:.2f}"])
    headers = ["inner steps of a run", "response steps", "hyper steps", "units / those of plain training"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def cifar() -> str:
    """Seed 0 of cifar10-resnet18: best validation loss so far, by epoch."""
    results, epochs = json.loads(tuned.path_of("cifar10-resnet18").read_text()), range(2, 21, 2)
    names = {"untuned": "untuned", "unlimited": "λ rises freely", "default": "default"}
    rows = []
    for start, (method, name) in itertools.product(tuned.STARTS, names.items()):
        losses = [loss for _, loss in results[f"{method} {start} 0"]["curve"]]
        rows.append([f"{start}, {name}", *(f"{min(losses[:epoch]):.3f}" for epoch in epochs)])
    return tabulate(rows, ["start", *map(str, epochs)], tablefmt="github", disable_numparse=True)


def _means(name: str, headers: list[str], digits: int) -> str:
    """Of an example: a line for each way, means over seeds; nothing where a way has no such number."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    rows = []
    for way, runs in found.items():
        means = [statistics.mean(column) for column in zip(*runs, strict=True)]
        rows.append([way, *("" if math.isnan(mean) else f"{mean:.{digits}f}" for mean in means)])
    first = f"mean of {len(next(iter(found.values())))} seeds"
    return tabulate(rows, [first, *headers], tablefmt="github", disable_numparse=True)


def classes() -> str:
    return _means("class_weights", ["test accuracy", "weight of the common class", "of the rare class"], 2)


def labels() -> str:
    return _means("label_noise", ["test accuracy", "stopped early", "area under the ROC curve"], 3)


def launches() -> str:
    return kernels.table(kernels.read())


def gpu() -> str:
    return on_device.table(read("gpu-cuda"))


def purposes() -> str:
    return kernels.purposes(kernels.read())


def of_worth() -> dict[str, Callable[[], str]]:
    """Tables of what practitioners do instead, of both readings."""
    kinds = {"": worth.summary, "_recipe": worth.against_recipe, "_starts": worth.starts}
    result: dict[str, Callable[[], str]] = {}
    for reading in READINGS:
        for suffix, kind in kinds.items():
            result[f"worth_{reading}{suffix}"] = lambda kind=kind, reading=reading: kind(worth.everything(), reading)
    result["worth"] = lambda: worth.overview(worth.everything())
    return result | {"worth_tasks": lambda: worth.tasks(worth.everything())}


TABLES = {
    "detection": detection, "overhead": overhead, "demo": demo,
    "suite": suite, "peer": peer, "augment": augment, "tuning": tuning_overview,
    "tasks": tasks, "hypergradient": hypergradients, "language": language, "ptb": penn_treebank,
    "replay": replayed, "refits": partial(refits.table_of, "lengths"), "recorded": partial(refits.table_of, "recorded"),
    "averages": partial(refits.table_of, "averages"), "controls": noise, "batchnorm": normed,
    "norms": statistics_of_norms, "host": hosts, "gpt": small_gpt, "kernels": launches, "gpu": gpu,
    "purposes": purposes,
    "whole": whole, "starts": starts, "units": units, "cifar": cifar, "classes": classes, "labels": labels,
    **of_worth(), **paper.PARTS, **TEXTS,
}  # fmt: skip


def rendered(text: str) -> str:
    """A page with its tables and sentences made anew from the results."""
    return PART.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
        print(f"written to {page}")
    plot_scaling(ROOT / "docs" / "results" / "scaling.png")
    tuned.plot(list(_tuned()), ROOT / "docs" / "results" / "tuning.png")
    ptb.draw(json.loads(ptb.FILE.read_text()), ROOT / "docs" / "guides" / "ptb.png")
    pictures.draw(json.loads(pictures.FILE.read_text()))
    hypergradient.draw(json.loads(hypergradient.RESULTS.read_text()), hypergradient.FIGURE)
    paper.draw()


if __name__ == "__main__":
    main()
