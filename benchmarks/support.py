"""The support matrix: which models transform, by which frontend, and whether their tangent is the derivative.

    python -m benchmarks.support [--only PATTERN ...] [--again]      (make support)

Every model that torchvision lists, the quantised ones aside, in float64 against a central difference of the original, in
train and eval mode. Adds to benchmarks/results/support.json as it goes, and goes on where it stopped. docs/results/support.md
is made of it. Large ones with repeated blocks left out are marked.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxstn
from benchmarks import zoo
from fxstn.ir.graphs import forked_rng
from fxstn.ir.node_info import info_of

RESULTS = Path(__file__).parent / "results" / "support.json"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "support.md"


def measure(name: str, seeds: int) -> dict[str, Any]:
    """One row: frontend, hyperparameters, responding parameters, nodes by rule and fallback, error, seconds to transform."""
    torch.manual_seed(0)
    model, inputs, short = zoo.build(name)
    live = zoo.family(name) in ("detection", "flow")
    start = time.perf_counter()
    stn = fxstn.transform(model, example_inputs=inputs if live else None)
    seconds = time.perf_counter() - start
    responding = sum(1 for key, _ in stn.response.named_parameters() if key.endswith(".R"))
    rules = _rules(stn, inputs)
    report = fxstn.verify(model, *inputs, seeds=seeds, trace=stn.frontend)
    return {
        "family": zoo.family(name),
        "shortened": short,
        "frontend": stn.frontend,
        "hyperparameters": len(stn.hparams),
        "responding": responding,
        "parameters": sum(1 for _ in model.parameters()),
        "by_rule": rules.total() - rules["fallback"],
        "fallback": rules["fallback"],
        "per_example": stn.frontend != "live" and stn.per_example(*inputs),
        "max_error": report.max_error,
        "ok": report.ok,
        "transform_s": round(seconds, 1),
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


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown, models in torchvision's order."""
    cells = []
    for name in sorted(rows, key=zoo.names().index):
        row = rows[name]
        if "failed" in row:
            cells.append([name, row["family"], "refused", *[""] * 5, row["failed"]])
            continue
        share = row["by_rule"] / max(1, row["by_rule"] + row["fallback"])
        cells.append(
            [
                name + (" (blocks left out)" if row["shortened"] else ""),
                row["family"],
                row["frontend"],
                f"{row['responding']} of {row['parameters']}",
                row["hyperparameters"],
                f"{share:.0%}",
                "yes" if row["per_example"] else "no",
                f"{row['transform_s']:.1f}",
                f"{row['max_error']:.0e}" + ("" if row["ok"] else " (too large)"),
            ]
        )
    headers = ["model", "task", "frontend", "parameters that respond", "hyperparameters", "nodes by rule", "ε per example",
               "transform, s", "largest relative error"]  # fmt: skip
    good, missing = sum(row.get("ok", False) for row in rows.values()), len(zoo.names()) - len(rows)
    left = f" ({missing} have not been run)" if missing else ""
    table = tabulate(cells, headers=headers, tablefmt="github")
    return (
        "# Support matrix\n\n"
        f"{good} of torchvision's {len(zoo.names())} models transform with `hparams=None` and pass{left}: in float64, train "
        "and eval mode, the emitted tangent equals a central difference of the original model to 1e-6. Random weights, two or "
        "four examples, the smallest images that the models take. Nodes not by rule use `torch.func.jvp` of that node, or live "
        "duals through a Python function that fx was told not to follow. Written by "
        f"`make support`; torch {torch.__version__.partition('+')[0]}, {torch.get_num_threads()} CPU threads.\n\n{table}\n"
    )


def _read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--again", action="store_true", help="also those that are there already")
    parser.add_argument("--seeds", type=int, default=3, help="points to try (default: 3)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = _read()
    chosen = [name for name in zoo.names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)]
    todo = [name for name in chosen if arguments.again or not rows.get(name, {}).get("ok")]
    for name in (progress := tqdm(todo)):
        progress.set_description(name)
        try:
            row = measure(name, arguments.seeds)
        except Exception as error:  # a row of the table
            row = {
                "family": zoo.family(name),
                "failed": f"{type(error).__name__}: {error}".partition("\n")[0][:200],
            }
            tqdm.write(f"{name}: {type(error).__name__}: {error}")
        rows = _read() | {name: row}  # another process may have added some
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
