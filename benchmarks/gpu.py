"""What is checked and measured on a machine with a GPU, in ten minutes: `make gpu`.

    python -m benchmarks.gpu [--device cuda] [--networks NAME ...] [--no-tests]
    python -m benchmarks.gpu --device cpu --tiny      # the same commands, to see that they run

The tests run, and each network is prepared in a process of its own (benchmarks/on_device.py), several at once. Then one network
after the other is measured, with nothing beside it. benchmarks/results/gpu-DEVICE.json is written after each part: a stop loses
nothing. Nothing is downloaded. `python -m benchmarks.tables` makes the table of docs/results/overhead.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("pytest", "tests/test_cuda.py", "-p", "no:cacheprovider", "-n")  # and the number of processes
PREPARE, MEASURE = 240, 45  # seconds: for the tests and for all first steps together, and for the times of a network
LIMIT = 600  # seconds of all
AT_ONCE = 7  # processes that prepare
SMALL = "three_layers, 2 × 32², dropout"
# {name: arguments of benchmarks.on_device}; what takes long to prepare is first.
NETWORKS: dict[str, tuple[str, ...]] = {
    "resnet18, graphs": ("resnet18, 128 × 32², both", "--compile"),
    "MLP, graphs": ("three_layers, 128 × 32², both", "--compile"),
    "vit_b_16, graphs": ("vit_b_16, 128 × 224², both, bf16", "--compile"),
    "resnet50, bfloat16, channels last, graphs": ("resnet50, 128 × 224², both, bf16", "--channels-last", "--compile"),
    "resnet18": ("resnet18, 128 × 32², both",),
    "MLP": ("three_layers, 128 × 32², both",),
    "resnet50": ("resnet50, 128 × 224², both",),
    "resnet50, bfloat16, channels last": ("resnet50, 128 × 224², both, bf16", "--channels-last"),
    "vit_b_16": ("vit_b_16, 128 × 224², both, bf16",),
    "convnext_tiny": ("convnext_tiny, 128 × 224², both, bf16",),
    "mobilenet_v3_small": ("mobilenet_v3_small, 128 × 224², both",),
    "resnet18, paper's": ("resnet18, 128 × 32², both", "--paper"),
}


@dataclass
class Process:
    """A module that is run with arguments. folder: for its files. gate: whether it waits before it measures."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    gate: bool

    def begin(self) -> None:
        self.start = time.perf_counter()
        own = ("--gate", str(self.at("ready")), "--json", str(self.at("json"))) if self.gate else ()
        self.log = self.at("log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *self.arguments, *own], cwd=ROOT, stdin=subprocess.PIPE, stdout=self.log,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip

    def at(self, suffix: str) -> Path:
        return self.folder / f"{self.name.replace(' ', '-')}.{suffix}"

    @property
    def is_prepared(self) -> bool:
        """Whether it is over, or waits."""
        return self.process.poll() is not None or self.at("ready").exists()

    def finish(self, seconds: float) -> dict[str, Any]:
        """Let it go on, for so many seconds at most; how it ended, its last lines, and what it measured."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:  # broken where it is over
            pipe.write(b"\n")
        try:
            outcome = "failed" if self.process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the processes that it started, too
            self.process.wait()
            outcome = "stopped"
        self.log.close()
        found = json.loads(self.at("json").read_text()) if self.at("json").exists() else {}
        lines = self.at("log").read_text(errors="replace").splitlines()
        last = lines[-12:] if outcome == "passed" else lines[-150:]
        return {"outcome": outcome, "seconds": round(time.perf_counter() - self.start, 1), "last lines": last} | found


def processes_of(device: str, tiny: bool, names: list[str], tests: bool, folder: Path) -> list[Process]:
    networks = {"MLP": (SMALL, "--rounds", "1")} if tiny else {name: NETWORKS[name] for name in names}
    own = [Process("tests", (*TESTS, "0" if tiny else "4"), folder, gate=False)] if tests else []
    module = ("benchmarks.on_device", "--device", device, "--case")
    return own + [Process(name, (*module, *rest), folder, gate=True) for name, rest in networks.items()]


def prepare(processes: list[Process], seconds: float) -> list[Process]:
    """Begin them, a few at once, until all are prepared or the time is over. Returns those that have begun."""
    end, begun = time.perf_counter() + seconds, 0
    while time.perf_counter() < end and not (begun == len(processes) and all(p.is_prepared for p in processes)):
        while begun < len(processes) and sum(not process.is_prepared for process in processes[:begun]) < AT_ONCE:
            processes[begun].begin()
            begun += 1
        time.sleep(0.2)
    return processes[:begun]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network and few steps")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), help="default: all")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    parser.add_argument(
        "--prepare", type=int, default=PREPARE, help="seconds for tests and first steps; default: %(default)s"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    args = parser.parse_args(arguments)
    file = args.results / f"gpu-{args.device.replace(':', '-')}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    end = time.perf_counter() + LIMIT
    with tempfile.TemporaryDirectory() as folder:
        todo = processes_of(args.device, args.tiny, args.networks, not args.no_tests, Path(folder))
        processes = prepare(todo, args.prepare)
        late = [
            process for process in processes if not process.is_prepared
        ]  # they end first: nothing runs beside a measurement
        for process in (bar := tqdm([*late, *(p for p in processes if p not in late)], disable=None)):
            bar.set_description(process.name)
            seconds = 0 if process in late else min(MEASURE, max(0, end - time.perf_counter()))
            result = results[process.name] = process.finish(seconds)
            file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            tqdm.write(f"{process.name}: {result['outcome']} after {result['seconds']} s {result.get('ratios', '')}")
    return int(len(processes) < len(todo) or any(results[process.name]["outcome"] != "passed" for process in processes))


if __name__ == "__main__":
    sys.exit(main())
