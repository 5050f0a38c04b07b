"""Beyond torchvision: the smallest model of every family in timm, transformed and checked like the support matrix.

    pip install timm; python -m benchmarks.families [--only PATTERN ...] [--again] [--structure]

timm has some hundred families, one Python module each, written by many hands. Each is checked in a process of its own,
with a time limit; results go to benchmarks/results/families.json and docs/results/families.md, and it goes on where it
stopped. --structure looks again which weights respond.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from typing import Any

import torch
from tabulate import tabulate

import fxstn
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
from benchmarks.zoo import CLASSES, LARGE, shortened

LIMIT = 600  # seconds for one model


def families() -> dict[str, list[str]]:
    """Names of timm's models by the module that defines them."""
    from timm.models import _registry, list_models

    found: dict[str, list[str]] = {}
    for name in list_models():
        found.setdefault(_registry._model_to_module[name], []).append(name)
    return dict(sorted(found.items()))


def smallest(names: list[str]) -> str:
    """The model with the fewest parameters."""
    from timm import create_model

    def size(name: str) -> int:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in create_model(name).parameters())
        except (NotImplementedError, RuntimeError):  # its initialisation reads values
            return sum(p.numel() for p in create_model(name).parameters())

    return min(names, key=size)


def _images(model: Any) -> torch.Tensor:
    """Four images of a quarter of the model's own height and width, or two of half or all of it: the first it takes."""
    settings = model.default_cfg
    channels, height, width = settings["input_size"]
    for share, batch in () if settings.get("fixed_input_size") else ((4, 4), (2, 2)):
        images = torch.randn(batch, channels, height // share, width // share)
        with contextlib.suppress(Exception), torch.no_grad():
            model.eval()(images)
            return images
    return torch.randn(2, channels, height, width)


def _build(name: str) -> tuple[Any, torch.Tensor, Row]:
    """(a model, a few images, what is known of it)."""
    from timm import create_model

    torch.manual_seed(0)
    model: Any = create_model(name, num_classes=CLASSES)
    inputs = _images(model)
    count = sum(p.numel() for p in model.parameters())
    row = {"model": name, "parameters": count, "shortened": count > LARGE}
    return (shortened(model) if count > LARGE else model).train(), inputs, row


def structure(_: str, row: Row) -> Row:
    """Which weights respond."""
    model, inputs, _ = _build(row["model"])
    return coverage_of(model, (inputs,), row["frontend"])


def _one(name: str, seeds: int) -> Row:
    """A row, of a model."""
    model, inputs, row = _build(name)
    row |= structure_of(model, (inputs,))
    report = fxstn.verify(model, inputs, seeds=seeds)
    return row | {"max_error": report.max_error, "ok": report.ok}


def measure(family: str, seeds: int) -> Row:
    """A row, in a process of its own, which may fail or run out of time."""
    name = _names.get(family) or smallest(families()[family])
    command = [sys.executable, "-m", "benchmarks.families", "--one", name, str(seeds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"model": name, "failed": f"not done in {LIMIT} s"}
    if done.returncode:
        failed = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]
        return {"model": name, "failed": failed}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def page(rows: dict[str, Row]) -> str:
    """The table as Markdown."""
    total = len(families())
    cells = []
    for family, row in sorted(rows.items()):
        if "failed" in row:
            cells.append([family, row["model"], *[""] * 3, row["failed"].replace("|", "\\|")])
            continue
        model = row["model"] + (" (blocks left out)" if row["shortened"] else "")
        cells.append([family, model, row["frontend"], *shown_coverage(row), shown_error(row)])
    good = sum(row.get("ok", False) for row in rows.values())
    headers = ["family", "smallest model", "frontend", *COLUMNS, "largest relative error"]
    left = f" ({total - len(rows)} have not been run)" if total > len(rows) else ""
    return (
        "# Beyond torchvision\n\n"
        f"{good} of timm's {total} families pass, by their smallest model with `hparams=None`{left}: in float64, train and "
        "eval mode, the emitted tangent equals a central difference of the original model to 1e-6. Random weights, two "
        f"or four images, a quarter, half or all of the model's own size.\n\n{DEFINITION} Written by "
        f"`python -m benchmarks.families`; torch {torch.__version__.partition('+')[0]}.\n\n"
        f"{tabulate(cells, headers=headers, tablefmt='github', disable_numparse=True)}\n"
    )


_names: dict[str, str] = {}  # {family: its smallest model}, where it is known

if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        warnings.simplefilter("ignore")
        print(json.dumps(_one(sys.argv[2], int(sys.argv[3]))))
    else:
        matrix = Matrix("families", list(families()), measure, structure, page)
        _names |= {family: row["model"] for family, row in matrix.rows().items() if "model" in row}
        run(matrix, __doc__ or "", seeds=2)
