"""Beyond torchvision: the smallest model of every family in timm, transformed and checked like the support matrix.

    pip install timm; python -m benchmarks.families [--only PATTERN ...] [--again]

timm has some hundred families, one Python module each, written by many hands. Each is checked in a process of its own,
with a time limit; results go to benchmarks/results/families.json and docs/results/families.md, and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxstn
from benchmarks.zoo import CLASSES, LARGE, shortened

RESULTS = Path(__file__).parent / "results" / "families.json"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "families.md"


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


def measure(name: str, seeds: int) -> dict[str, Any]:
    """One row: frontend, error, seconds."""
    from timm import create_model

    torch.manual_seed(0)
    model: Any = create_model(name, num_classes=CLASSES)
    inputs = _images(model)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGE:
        model = shortened(model)
    start = time.perf_counter()
    report = fxstn.verify(model.train(), inputs, seeds=seeds)
    return {
        "parameters": count,
        "shortened": count > LARGE,
        "frontend": report.frontend,
        "max_error": report.max_error,
        "ok": report.ok,
        "seconds": round(time.perf_counter() - start),
    }


def apart(name: str, seeds: int, limit: float) -> dict[str, Any]:
    """measure in a process of its own, which may fail or run out of time."""
    command = [sys.executable, "-m", "benchmarks.families", "--one", name, "--seeds", str(seeds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def page(rows: dict[str, dict[str, Any]], total: int) -> str:
    """The table as Markdown."""
    cells = []
    for family, row in sorted(rows.items()):
        if "failed" in row:
            cells.append([family, row["model"], "", "", row["failed"].replace("|", "\\|")])
            continue
        model = row["model"] + (" (blocks left out)" if row["shortened"] else "")
        error = f"{row['max_error']:.0e}" + ("" if row["ok"] else " (too large)")
        cells.append([family, model, row["frontend"], row["seconds"], error])
    good = sum(row.get("ok", False) for row in rows.values())
    headers = ["family", "smallest model", "frontend", "seconds to verify", "largest relative error"]
    left = f" ({total - len(rows)} have not been run)" if total > len(rows) else ""
    return (
        "# Beyond torchvision\n\n"
        f"{good} of timm's {total} families pass, by their smallest model with `hparams=None`{left}: in float64, train and "
        "eval mode, the emitted tangent equals a central difference of the original model to 1e-6. Random weights, two "
        f"or four images, a quarter, half or all of the model's own size. Written by `python -m benchmarks.families`; torch "
        f"{torch.__version__.partition('+')[0]}.\n\n{tabulate(cells, headers=headers, tablefmt='github')}\n"
    )


def _read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of family names")
    parser.add_argument("--again", action="store_true", help="also those that pass already")
    parser.add_argument("--seeds", type=int, default=2, help="points to try (default: 2)")
    parser.add_argument("--limit", type=float, default=600, help="seconds per model (default: 600)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.seeds)))
        return
    rows = _read()
    every = families()
    chosen = [family for family in every if any(fnmatch.fnmatchcase(family, pattern) for pattern in arguments.only)]
    todo = [family for family in chosen if arguments.again or not rows.get(family, {}).get("ok")]
    for family in (progress := tqdm(todo)):
        progress.set_description(family)
        name = rows[family]["model"] if family in rows else smallest(every[family])
        row = {"model": name} | apart(name, arguments.seeds, arguments.limit)
        if "failed" in row:
            tqdm.write(f"{family}: {row['failed']}")
        rows = _read() | {family: row}  # another process may have added some
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(rows, len(every)))


if __name__ == "__main__":
    main()
