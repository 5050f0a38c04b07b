"""What is checked and measured on a machine with a GPU, in ten minutes: `make gpu`.

    python -m benchmarks.gpu [--device cuda] [--parts NAME ...]
    python -m benchmarks.gpu --device cpu --tiny      # the same commands, to see that they run

Each part is a process with a time limit of its own. After each one benchmarks/results/gpu-DEVICE.json says how it ended, and
what it measured is in a file of its own already: a stop loses nothing. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("general", "response", "schedule", "schedule-default")


@dataclass(frozen=True)
class Part:
    """A module that is run with arguments, for so many seconds at most."""

    name: str
    seconds: int
    arguments: tuple[str, ...]


def overhead(name: str, seconds: int, network: str, *options: str, memory: bool = False) -> Part:
    """The overhead of one network; one process, or, for the peak memory, one for each variant."""
    own = ("--memory", "plain", "schedule", "schedule-default") if memory else ("--memory",)
    arguments = ("benchmarks.overhead", "--networks", network, "--processes", "1", "--variants", *STEPS, *own, *options)
    return Part(name, seconds, arguments)


def parts(device: str, tiny: bool) -> list[Part]:
    """In the order of what is worth most. Their limits are ten minutes in all."""
    tests = Part("tests", 150, ("pytest", "tests/test_cuda.py", "-n", "0", "-p", "no:cacheprovider"))
    on = ("--device", device)
    if tiny:
        small = (*on, "--batch-size", "2", "--rounds", "1", "--image-size", "32")
        return [tests, overhead("mlp", 120, "mlp", *small)]
    on = (*on, "--rounds", "8")
    fast = (*on, "--bf16", "--channels-last", "--batch-size", "128")
    return [
        tests,
        overhead("resnet18", 50, "resnet18", *on, "--batch-size", "128"),
        overhead("resnet18, compiled", 100, "resnet18", *on, "--batch-size", "128", "--compile"),
        overhead("mlp", 30, "mlp", *on),
        overhead("mlp, compiled", 50, "mlp", *on, "--compile"),
        overhead("resnet50, bfloat16", 60, "resnet50", *fast, "--image-size", "224"),
        overhead("resnet50, bfloat16, compiled", 110, "resnet50", *fast, "--image-size", "224", "--compile"),
        overhead("resnet18, memory", 50, "resnet18", *on, "--batch-size", "128", "--image-size", "64", memory=True),
    ]


def run(part: Part, results: Path) -> dict[str, Any]:
    """How a part ended: "passed", "failed" or "stopped" at its limit; its time and its last lines.

    results: the folder of its files.
    """
    more = ("--results", str(results)) if part.arguments[0].startswith("benchmarks.") else ()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *part.arguments, *more], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=part.seconds)
        outcome = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
        text, outcome = process.communicate()[0], "stopped"
    seconds = round(time.perf_counter() - start, 1)
    return {"outcome": outcome, "seconds": seconds, "limit": part.seconds, "last lines": text.splitlines()[-40:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network and few steps")
    parser.add_argument("--parts", nargs="+", help="their names; default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    args = parser.parse_args(arguments)
    file, results = args.results / f"gpu-{args.device.replace(':', '-')}.json", {}
    chosen = [part for part in parts(args.device, args.tiny) if not args.parts or part.name in args.parts]
    for part in (bar := tqdm(chosen, disable=None)):
        bar.set_description(part.name)
        results[part.name] = run(part, args.results)
        file.write_text(json.dumps(results, indent=1) + "\n")
        tqdm.write(f"{part.name}: {results[part.name]['outcome']} after {results[part.name]['seconds']} s")
    return int(any(result["outcome"] != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
