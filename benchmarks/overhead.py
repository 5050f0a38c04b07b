"""Overhead of the response and of the whole schedule against plain training: medians over fresh processes.

    python -m benchmarks.overhead                        # resnet18, batch 64, 32×32, three processes
    python -m benchmarks.overhead --networks all --processes 1 --rounds 5
    python -m benchmarks.overhead --device cuda --compile --bf16 --channels-last

Writes benchmarks/results/overhead-NETWORK-DEVICE[-OPTIONS].json: one row per variant with the median ratio, the ratios of
each process, the median step time and peak memory. `python -m benchmarks.tables` makes tables and plots of them.
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
# name → (what `fxstn bench` calls it, batch size, image size)
NETWORKS = {
    "resnet18": ("resnet18", 64, 32),
    "resnet50": ("resnet50", 32, 32),
    "vgg16": ("vgg16", 32, 32),
    "alexnet": ("alexnet", 64, 64),
    "mobilenet_v3_small": ("mobilenet_v3_small", 64, 64),
    "convnext_tiny": ("convnext_tiny", 16, 64),
    "vit_b_16": ("benchmarks.networks:vit_b_16", 16, 64),
    "mlp": ("benchmarks.networks:mlp", 128, 32),
}
OPTIONS = ("compile", "bf16", "channels-last", "recompute")


def one_process(network: str, options: list[str], memory: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of one `fxstn bench` in a process of its own. memory: variants whose peak is measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "fxstn",
            "bench",
            network,
            "--json",
            str(file),
            *options,
        ]
        subprocess.run([*command, "--memory", *(memory or [])], check=True, stdout=subprocess.DEVNULL)
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        return rows


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


def measure(name: str, args: argparse.Namespace) -> Path:
    """Measure one network and write its file."""
    network, batch, image = NETWORKS[name]
    chosen = [option for option in OPTIONS if getattr(args, option.replace("-", "_"))]
    options = ["--batch-size", args.batch_size or batch, "--image-size", args.image_size or image]
    options += ["--rounds", args.rounds, "--device", args.device, *(f"--{option}" for option in chosen)]
    options += ["--variants", *args.variants] if args.variants else []
    runs = [
        one_process(network, [str(o) for o in options], args.memory if i == 0 else None) for i in range(args.processes)
    ]
    rows = medians(runs)
    shown = [[r["variant"], r["step_ms"], r["ratio"], r["processes"], r["peak_mb"]] for r in rows]
    tqdm.write(f"{name}\n" + tabulate(shown, ["variant", "step ms", "ratio", "each process", "peak MB"]))
    device = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    size = [f"{args.batch_size or batch}x{args.image_size or image}"] if args.batch_size or args.image_size else []
    file = args.results / ("-".join(["overhead", name, device, *size, *chosen]) + ".json")
    file.write_text(json.dumps(rows, indent=1) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=["resnet18"], choices=["all", *NETWORKS], help="which networks"
    )
    parser.add_argument("--variants", nargs="+", help="of those that `fxstn bench` knows; default: all")
    parser.add_argument("--batch-size", type=int, help="examples per step, in place of the network's own number")
    parser.add_argument("--image-size", type=int, help="pixels, in place of the network's own number")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds in each process")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--memory",
        nargs="*",
        default=["plain", "general", "response", "schedule", "schedule-default", "func-jvp"],
        help="variants whose peak memory is measured",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    for option in OPTIONS:
        parser.add_argument(f"--{option}", action="store_true", help="as for `fxstn bench`")
    args = parser.parse_args()
    for name in tqdm(NETWORKS if "all" in args.networks else args.networks, desc="networks", disable=None):
        tqdm.write(f"written to {measure(name, args)}")


if __name__ == "__main__":
    main()
