"""What the support matrices have in common: rows kept in a file, measured again as asked, a page made of them."""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fxstn
from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.inputs import InputSpec, as_inputs
from fxstn.frontends.original import plain_copy
from fxstn.ir.coverage import Coverage
from fxstn.passes.hyperize import responses
from fxstn.passes.recipe import canonical_graphs
from fxstn.transform import FRONTENDS

ROOT = Path(__file__).resolve().parent.parent
DEFINITION = (
    "Weights that could respond are the trainable parameters of two or more dimensions that the forward reads; the columns "
    "count them, and in brackets the share of their elements. Behind a plus are weights before a batch norm: "
    '`response="scaled"`, the default, leaves them out, because their scale has no effect there, and the affine parameters of '
    'the norm respond in their place. With `response="structured"` they respond.'
)
COLUMNS = ["weights that respond", "structured"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Matrix:
    """A support matrix.

    name: of the file with results, and of the page.
    names: rows in the order in which they are measured.
    measure: (name, seeds) → all columns.
    structure: (name, its row so far) → the columns that need no derivative, or those of weights that respond.
    page: rows → the page.
    """

    name: str
    names: Sequence[str]
    measure: Callable[[str, int], Row]
    structure: Callable[[str, Row], Row]
    page: Callable[[dict[str, Row]], str]

    @property
    def results(self) -> Path:
        return ROOT / "benchmarks" / "results" / f"{self.name}.json"

    def rows(self) -> dict[str, Row]:
        return json.loads(self.results.read_text()) if self.results.exists() else {}

    def enter(self, name: str, row: Row) -> None:
        """Add a row to the file, to which another process may have added some, and make the page again."""
        rows = self.rows() | {name: row}
        self.results.write_text(json.dumps(rows, indent=1) + "\n")
        (ROOT / "docs" / "results" / f"{self.name}.md").write_text(self.page(rows))


def structure_of(model: nn.Module, inputs: Any) -> Row:
    """The columns that need no derivative: which weights respond, ε per example, seconds to transform.

    inputs: of `transform`, a tuple or a dict.
    """
    start = time.perf_counter()
    stn = fxstn.transform(model, example_inputs=inputs)
    seconds = time.perf_counter() - start
    args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    alone = stn.per_example(*args, **named)
    row = {"frontend": stn.frontend, "per_example": alone, "transform_s": round(seconds, 1)}
    return row | coverage_of(model, inputs, stn.frontend)


def coverage_of(model: nn.Module, inputs: Any, frontend: str) -> Row:
    """The columns of weights that respond, for which no graph is emitted."""
    model = plain_copy(model)
    arguments, frozen = as_inputs(inputs, model), tuple(sorted(frozen_modules(model)))
    kind = next(kind for kind in FRONTENDS if kind.name == frontend)
    graphs = canonical_graphs(kind(InputSpec.of(model, arguments)), model, frozen, arguments)
    found = {name: responses(graphs, structured=name == "structured") for name in ("scaled", "structured")}
    scaled, structured = (Coverage.of(model, result.axes, result.obstacles) for result in found.values())
    return {
        "scaled": _numbers(scaled),
        "structured": _numbers(structured),
        "left_out": [len(scaled.omitted), sum(weight.elements for weight in scaled.omitted)],
        "lost": [[weight.name, weight.reason] for weight in structured.lost[:3]],
    }


def _numbers(coverage: Coverage) -> list[int]:
    return [coverage.responding, coverage.possible, coverage.responding_elements, coverage.possible_elements]


def shown_coverage(row: Row) -> list[str]:
    """COLUMNS of a row."""
    if "scaled" not in row:
        return ["", ""]
    left_out = f" + {row['left_out'][0]}" if row["left_out"][0] else ""
    return [_shown(row["scaled"]) + left_out, _shown(row["structured"])]


def _shown(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} of {numbers[1]} ({share_of(numbers):.1%})"


def share_of(numbers: Sequence[int]) -> float:
    """Of the elements that could respond, those that do."""
    return numbers[2] / numbers[3] if numbers[3] else 1.0


def shown_error(row: Row) -> str:
    if "max_error" not in row:
        return ""
    return f"{row['max_error']:.0e}" + ("" if row["ok"] else " (too large)")


def run(matrix: Matrix, description: str, seeds: int = 3) -> None:
    """The command line of a matrix."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names")
    parser.add_argument("--again", action="store_true", help="also those that pass already")
    parser.add_argument("--structure", action="store_true", help="only the columns that need no derivative")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"points to try (default: {seeds})")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = matrix.rows()
    chosen = [name for name in matrix.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)]
    if arguments.structure:
        chosen = [name for name in chosen if "failed" not in rows.get(name, {})]
    else:
        chosen = [name for name in chosen if arguments.again or not rows.get(name, {}).get("ok")]
    for name in (progress := tqdm(chosen)):
        progress.set_description(name)
        torch.manual_seed(0)
        try:
            row = (
                matrix.structure(name, rows.get(name, {}))
                if arguments.structure
                else matrix.measure(name, arguments.seeds)
            )
        except Exception as error:  # a row of the table
            row = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            tqdm.write(f"{name}: {type(error).__name__}: {error}")
            if arguments.structure:  # what has been measured stays
                continue
        before = rows.get(name, {})
        matrix.enter(name, ({} if "failed" in before or "failed" in row else before) | row)
