"""The support matrix: which models transform, by which frontend, and whether their tangent is the derivative.

    python -m benchmarks.support [--only PATTERN ...] [--again] [--structure]      (make support)

Every model that torchvision lists, the quantised ones aside, in float64 against a central difference of the original, in
train and eval mode. Adds to benchmarks/results/support.json as it goes, and goes on where it stopped; docs/results/support.md
is made of it. Large ones with repeated blocks left out are marked. --structure looks again which weights respond.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tabulate import tabulate

import fxstn
from benchmarks import zoo
from benchmarks.matrix import (
    COLUMNS,
    DEFINITION,
    Matrix,
    Row,
    coverage_of,
    run,
    shown_coverage,
    shown_error,
    structure_of,
)
from fxstn.ir.generators import forked_rng
from fxstn.ir.node_info import info_of


def structure(name: str, row: Row) -> Row:
    """Which weights respond."""
    model, inputs, _ = zoo.build(name)
    return coverage_of(model, inputs, row["frontend"])


def measure(name: str, seeds: int) -> Row:
    """One row: also hyperparameters, nodes by rule and fallback, error."""
    model, inputs, short = zoo.build(name)
    row = {"family": zoo.family(name), "shortened": short} | structure_of(model, inputs)
    stn = fxstn.transform(model, example_inputs=inputs)
    rules = _rules(stn, inputs)
    report = fxstn.verify(model, *inputs, seeds=seeds, trace=stn.frontend)
    return row | {
        "hyperparameters": len(stn.hparams),
        "by_rule": rules.total() - rules["fallback"],
        "fallback": rules["fallback"],
        "max_error": report.max_error,
        "ok": report.ok,
    }


def _rules(stn: fxstn.SelfTuningNetwork, inputs: tuple) -> Counter[str]:
    """How many operations that a tangent goes through are done by which kind of rule."""
    graph: Any = stn.graph("pushforward")
    if stn.frontend != "live":
        return Counter(rule for node in graph.graph.nodes if (rule := info_of(node).rule))
    log: list[Any] = []
    with forked_rng(), torch.no_grad():
        graph.duals(inputs, {}, None, torch.zeros_like(stn.hparams.unconstrained), log)
    return Counter(note.kind for note in log if note.kind != "dropout")


def page(rows: dict[str, Row]) -> str:
    """The table as Markdown, models in torchvision's order."""
    cells = []
    for name in sorted(rows, key=zoo.names().index):
        row = rows[name]
        if "failed" in row:
            cells.append([name, row["family"], "refused", *[""] * 6, row["failed"]])
            continue
        share = row["by_rule"] / max(1, row["by_rule"] + row["fallback"])
        cells.append(
            [
                name + (" (blocks left out)" if row["shortened"] else ""),
                row["family"],
                row["frontend"],
                *shown_coverage(row),
                row["hyperparameters"],
                f"{share:.0%}",
                "yes" if row["per_example"] else "no",
                f"{row['transform_s']:.1f}",
                shown_error(row),
            ]
        )
    headers = ["model", "task", "frontend", *COLUMNS, "hyperparameters", "nodes by rule", "ε per example",
               "transform, s", "largest relative error"]  # fmt: skip
    good, missing = sum(row.get("ok", False) for row in rows.values()), len(zoo.names()) - len(rows)
    left = f" ({missing} have not been run)" if missing else ""
    table = tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        "# Support matrix\n\n"
        f"{good} of torchvision's {len(zoo.names())} models transform with `hparams=None` and pass{left}: in float64, train "
        "and eval mode, the emitted tangent equals a central difference of the original model to 1e-6. Random weights, two or "
        "four examples, the smallest images that the models take. Nodes not by rule use `torch.func.jvp` of that node, or live "
        f"duals through a Python function that fx was told not to follow.\n\n{DEFINITION} Written by "
        f"`make support`; torch {torch.__version__.partition('+')[0]}, {torch.get_num_threads()} CPU threads.\n\n{table}\n"
    )


if __name__ == "__main__":
    run(Matrix("support", zoo.names(), measure, structure, page), __doc__ or "")
