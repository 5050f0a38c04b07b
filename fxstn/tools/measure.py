"""Step times that alternate in one process, and peak memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def step_times(
    steps: Mapping[str, tuple[Callable[[], None], int]], rounds: int, warmup: int, device: str, quiet: bool
) -> dict[str, float]:
    """Median seconds per inner step, by name. The variants alternate within each round.

    steps: name → (what to run, how many inner steps it does).
    rounds, warmup: rounds that are measured, and rounds before them.
    device: CUDA is synchronized before each reading of the clock.
    quiet: no progress bar.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc="rounds", leave=False, disable=True if quiet else None):
        for name, (step, inner) in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if number >= warmup:
                times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Callable[[], None], device: str, steps: int = 3) -> float:
    """Peak MB over a few steps, less what is in use before the first. Meant for a fresh process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(steps):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before_kb = _reset_peak()
    for _ in range(steps):
        step()
    return (_peak_kb() - before_kb) / 1e3


def _status_kb(key: str) -> int | None:
    """A line of /proc/self/status; None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _peak_kb() -> int:
    return _status_kb("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> int:
    """Resident kB now. Linux forgets the peak, which building the model may have set."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return _peak_kb()
    return _status_kb("VmRSS:") or _peak_kb()
