"""What a device takes for a step of plain training, and for each kind of step of a run; `make gpu` starts it for each network.

    python -m benchmarks.on_device --case "resnet18, 128 × 32², both" --json FILE [--compile] [--paper] [--device cuda]

Times are medians of rounds in which the kinds of steps alternate, each several times without a wait in between. The profiler
counts kernels, and the time in which the device has one. With --gate FILE it writes that file when everything has run once,
compiled where it is to be, and measures when it reads a line: so several processes can prepare at once, and measure in turn.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxstn
from benchmarks.kernels import (
    DECAY,
    PULL_BACK,
    SPECS,
    STEPS,
    TABLE,
    Case,
    cycle,
    fixed_sgd,
    network,
    rates,
    step_plainly,
)
from fxstn import hp
from fxstn.bilevel.settings import PAPER
from fxstn.bilevel.training import TrainingLoop
from fxstn.tools.bench import LONG, SHORT, environment, plain_baseline

CASES = {
    case.name: case
    for case in (
        *TABLE,
        Case("resnet50", image_size=224, bf16=True),
        Case("benchmarks.networks:three_layers", 2, tuned="dropout"),
    )
}
CYCLE = 20  # inner steps until the default schedule repeats itself
REPEATS = 5  # steps of a kind between two waits for the device
NOT_KERNELS = ("Memcpy", "Memset")  # beginnings of names


class Measured:
    """A network that is trained plainly, and the same one in a run, on a device.

    compiled: both by torch.compile, on CUDA with CUDA graphs.
    paper: the paper's schedule and response.
    """

    def __init__(self, case: Case, device: str, compiled: bool, paper: bool, channels_last: bool) -> None:
        self.case, self.device, self.graphs = case, device, compiled and device.startswith("cuda")
        self.precision = torch.bfloat16 if case.bf16 else None
        layout = {"memory_format": torch.channels_last} if channels_last else {}
        few = torch.rand(4, 3, case.image_size, case.image_size)
        x = torch.rand(case.batch_size, 3, case.image_size, case.image_size).to(device, **layout)
        self.batch = x, torch.randint(10, (case.batch_size,)).to(device)
        specs = SPECS[case.tuned]
        dropouts = [spec for spec in specs() or [] if isinstance(spec, hp.Dropout)] or None
        self.plain: nn.Module = plain_baseline(case.build(), dropouts).to(device, **layout).train()
        self.optimizer = fixed_sgd(self.plain, 0.0 if case.tuned == "dropout" else DECAY)
        self.stn = network(case.build(), specs(), few, response="structured" if paper else "scaled").to(
            device, **layout
        )
        self.settings: dict[str, Any] = PAPER if paper else {}
        if compiled:
            options = fxstn.ExecutionSettings(compile=True).compile_options(torch.device(device))
            self.plain = torch.compile(self.plain, **options)  # type: ignore[assignment,arg-type]
            self.stn.compile(**options)

    def step_plainly(self) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        step_plainly(self.plain, self.optimizer, *self.batch, self.precision)

    def new_run(self, inner: int) -> TrainingLoop:
        """A loop over a pass of so many inner steps, as a run begins with them."""
        execution = fxstn.ExecutionSettings(autocast=self.precision)
        batches, loop = cycle(self.stn, *self.batch, execution=execution, **self.settings)
        loop.tuner.stepper.replays = self.graphs
        batches.left = inner
        return loop

    def kinds(self) -> dict[str, Callable[[], object]]:
        """{kind of step: a function that does it}."""
        stepper = self.new_run(1).tuner.stepper
        inner = partial(stepper.inner, [self.batch])

        def inner_with_pull_back() -> None:
            inner(tunes=True)
            stepper.forget_notes()

        return {
            "plain": self.step_plainly, "inner": partial(inner, tunes=False), PULL_BACK: inner_with_pull_back,
            "response": partial(stepper.response, [self.batch]), "hyper": partial(stepper.hyper, self.batch),
        }  # fmt: skip

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object], steps: int) -> tuple[float, float]:
        """(ms until the host is done, ms until the device is done), for each of the steps that the work is."""
        self.wait()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        self.wait()
        return 1e3 * host / steps, 1e3 * (time.perf_counter() - start) / steps

    def times(self, rounds: int) -> dict[str, dict[str, float]]:
        """{kind, or "cycle" for an inner step of a run with all that belongs to it: {"host", "ms"}}."""
        kinds, found = self.kinds(), {name: [] for name in ("plain", "inner", PULL_BACK, "response", "hyper", "cycle")}
        for _ in range(rounds):
            for name, step in kinds.items():
                found[name].append(self.timed(partial(repeat, step), REPEATS))
            loop = self.new_run(CYCLE)
            found["cycle"].append(self.timed(partial(loop.epoch, lambda: None), CYCLE))
        return {
            name: dict(zip(("host", "ms"), map(statistics.median, zip(*values, strict=True)), strict=True))
            for name, values in found.items()
        }

    def peaks(self) -> dict[str, float]:
        """Peak MB of plain training and of a cycle, beside what is in memory before it."""
        if self.graphs or not self.device.startswith("cuda"):  # graphs keep what they once had
            return {}
        result = {}
        loop = self.new_run(CYCLE)
        for name, work in (("plain", partial(repeat, self.step_plainly)), ("run", partial(loop.epoch, lambda: None))):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            result[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return result

    def kernels(self) -> dict[str, dict[str, float]]:
        """{kind: {"kernels", "busy"}}: kernels of a step as the profiler counts them, and their time in ms."""
        if not self.device.startswith("cuda"):
            return {}
        result, loop = {}, self.new_run(CYCLE)
        kinds = self.kinds()
        works = {name: (partial(repeat, step), REPEATS) for name, step in kinds.items()}
        for name, (work, steps) in (works | {"cycle": (partial(loop.epoch, lambda: None), CYCLE)}).items():
            self.wait()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
                work()
                self.wait()
            on_device = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            own = [
                e
                for e in on_device
                if not e.name.startswith(NOT_KERNELS) and not getattr(e, "is_user_annotation", False)
            ]
            result[name] = {"kernels": len(own) / steps, "busy": sum(e.device_time_total for e in own) / 1e3 / steps}
        return result

    def host_profile(self, lines: int = 30) -> Iterator[str]:
        """Where Python is in each kind of step, and in a cycle: the functions with most time of their own."""
        kinds = {name: partial(repeat, step) for name, step in self.kinds().items()}
        for name, work in (kinds | {"cycle": partial(self.new_run(CYCLE).epoch, lambda: None)}).items():
            profiler = cProfile.Profile()
            self.wait()
            profiler.runcall(work)
            text = StringIO()
            pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
            yield f"{name}\n{text.getvalue()}"


def repeat(step: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        step()


def ratio(times: Mapping[str, Mapping[str, float]], inner: int) -> float:
    """Of a run's first so many inner steps to plain training.

    times: as from `Measured.times`, of the default schedule. What a cycle takes beside its steps is between them.
    """
    kinds = {name: value["ms"] for name, value in times.items()}
    kinds[PULL_BACK] -= kinds["inner"]

    def whole(shares: Mapping[str, float]) -> float:
        return sum(shares[kind] * kinds[kind] for kind in (*STEPS, PULL_BACK))

    first = {
        "inner": 1,
        "response": 1 / fxstn.ResponseSettings.every,
        "hyper": 1 / fxstn.HyperSettings.train_steps,
        PULL_BACK: 1,
    }
    return (whole(rates(inner)) + kinds["cycle"] - whole(first)) / kinds["plain"]


def busy(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """As `Measured.times`, of the time in which the device has a kernel."""
    return {name: {"ms": one["busy"]} for name, one in entry["kernels"].items()}


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured, as Markdown; the default schedule alone."""
    rows = []
    for name, entry in entries.items():
        if not entry.get("ratios"):
            continue
        plain, kernels = entry["times"]["plain"]["ms"], entry["kernels"]
        short, long = (
            ratio(entry["times"], inner) for inner in (SHORT, LONG)
        )  # with as many steps as the schedule has now
        launched = " → ".join(f"{kernels[kind]['kernels']:.0f}" for kind in ("plain", "cycle"))
        peaks = entry.get("peaks")
        rows.append([
            f"{entry['case']}, {'CUDA graphs' if name.endswith('graphs') else 'eager'}", f"{plain:.1f}",
            f"{plain * short:.1f}", f"{short:.2f}", f"{long:.2f}",
            f"{kernels['plain']['busy']:.2f}", f"{ratio(busy(entry), SHORT):.2f}", launched,
            f"{peaks['run'] / peaks['plain']:.2f}" if peaks else "–",
        ])  # fmt: skip
    headers = [
        "network, batch × image, what is tuned", "plain, ms", "default, ms", "default / plain, 1,000 steps", "10,000 steps",
        "plain, ms of the device", "default / plain, of the device", "kernels, a cycle", "memory",
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=list(CASES), help="a network, its batch, and what is tuned")
    parser.add_argument("--json", required=True, type=Path, help="the file that is written")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the kinds of steps alternate")
    parser.add_argument("--gate", type=Path, help="a file that says that everything has run once")
    for flag in ("compile", "paper", "channels-last", "host-profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    measured = Measured(CASES[args.case], args.device, args.compile, args.paper, args.channels_last)
    start = time.perf_counter()
    for _ in range(3 if args.compile else 1):
        for step in measured.kinds().values():
            step()
        measured.new_run(CYCLE).epoch(lambda: None)
    measured.wait()
    result: dict[str, Any] = environment(args.device) | {
        "case": args.case,
        "first_seconds": time.perf_counter() - start,
    }
    if args.gate:
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()  # others prepare
        args.gate.touch()
        sys.stdin.readline()
    gc.collect()
    gc.freeze()  # what is there stays, as in a run that has lasted
    result["times"] = measured.times(args.rounds)
    if not args.paper:
        result["ratios"] = {str(inner): ratio(result["times"], inner) for inner in (SHORT, LONG)}
    result["first cycle"] = result["times"]["cycle"]["ms"] / result["times"]["plain"]["ms"]
    for name, part in (("peaks", measured.peaks), ("kernels", measured.kernels)):
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        result[name] = part()
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.host_profile:
        print(*measured.host_profile(), sep="\n")


if __name__ == "__main__":
    main()
