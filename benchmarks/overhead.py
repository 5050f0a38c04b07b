"""Overhead of the response and of the whole schedule against plain training: medians over fresh processes.

    python -m benchmarks.overhead                      # resnet18, batch 64, 32×32, three processes
    python -m benchmarks.overhead --device cuda --batch-size 128

Writes benchmarks/results/overhead-MODEL-DEVICE.json: one row per variant with the median ratio, the ratios of each
process, the median step time and peak memory.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"


def one_process(args: argparse.Namespace, memory: bool) -> list[dict[str, Any]]:
    """Rows of one `fxstn bench` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-W", "ignore", "-m", "fxstn.cli", "bench", args.model, "--json", str(file)]
        for name in ("batch_size", "image_size", "rounds", "device"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        subprocess.run(command + ([] if memory else ["--no-memory"]), check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant over all processes."""
    rows = []
    for same in zip(*runs, strict=True):
        ratios = [row["ratio"] for row in same if row["ratio"] is not None]
        row = dict(same[0]) | {"processes": ratios}
        if ratios:
            row["ratio"] = statistics.median(ratios)
            row["step_ms"] = statistics.median(row["step_ms"] for row in same)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds in each process")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    runs = [one_process(args, memory=i == 0) for i in tqdm(range(args.processes), desc="processes", disable=None)]
    rows = medians(runs)
    print(tabulate([[r["variant"], r["step_ms"], r["ratio"], r["processes"], r["peak_mb"]] for r in rows],
                   ["variant", "step ms", "ratio", "each process", "peak MB"]))  # fmt: skip
    device = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    file = RESULTS / f"overhead-{args.model}-{device}.json"
    file.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
