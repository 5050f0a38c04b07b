"""fxstn bench: what tuning costs, as a ratio to plain training with fixed dropout at the same places."""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.runner import DEFAULT_RESPONSE_FRACTION
from fxstn.condition import bind
from fxstn.fidelity import frozen_modules
from fxstn.layers.response import parameter_changes
from fxstn.network import SelfTuningNetwork, held
from fxstn.transform import followed, transform

VARIANTS = ("plain", "general", "response", "schedule", "schedule-default", "func-jvp", "func-jvp-batch")
TRAIN_STEPS = 5


class _FixedDropout:
    """A forward hook: plain dropout after a module."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        return F.dropout(output, self.p, module.training) if isinstance(output, Tensor) else output


def plain_baseline(model: nn.Module) -> nn.Module:
    """The original model with torch's own dropout, at fixed rates, wherever `hparams=None` tunes one."""
    model = copy.deepcopy(model)
    graph = followed(model, True, frozen_modules(model))
    binding = bind(graph, None)
    rates = {site.path: binding.quantities[site.index].init for site in binding.sites}
    for path, p in rates.items():
        if path == "input":
            model.register_forward_pre_hook(
                lambda module, inputs, p=p: (F.dropout(inputs[0], p, module.training), *inputs[1:])
            )
            continue
        module = model.get_submodule(path)
        if isinstance(module, _DropoutNd):
            module.p = p
        else:
            module.register_forward_hook(_FixedDropout(p))
    return model


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def variants(model: nn.Module, x: Tensor, target: Tensor, names: Sequence[str]) -> dict[str, Callable[[], None]]:
    """name → one inner step, optimizer included. A schedule's step is a whole cycle of TRAIN_STEPS inner steps."""
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    stn = transform(model).train()
    general = _stepper(sgd(stn.general_parameters()))
    response = _stepper(sgd(stn.response_parameters()))
    hyper = _stepper(torch.optim.RMSprop(stn.hparams.parameters(), lr=1e-3))
    made: dict[str, Callable[[], None]] = {}

    def cycle(fraction: float) -> None:
        part = max(1, int(len(x) * fraction))
        for _ in range(TRAIN_STEPS):
            general(general_loss(stn, F.cross_entropy, x, target))
            response(response_loss(stn, F.cross_entropy, x[:part], target[:part]))
        hyper(hyper_loss(stn, F.cross_entropy, x, target))

    if "plain" in names:
        plain = plain_baseline(model).train()
        plain_step = _stepper(sgd(plain.parameters()))
        made["plain"] = lambda: plain_step(F.cross_entropy(plain(x), target))
    made["general"] = lambda: general(general_loss(stn, F.cross_entropy, x, target))
    made["response"] = lambda: response(response_loss(stn, F.cross_entropy, x, target))
    made["schedule"] = lambda: cycle(1.0)
    made["schedule-default"] = lambda: cycle(DEFAULT_RESPONSE_FRACTION)
    if "func-jvp" in names:
        made["func-jvp"] = lambda: response(_func_jvp_per_example(stn, x, target))
    if "func-jvp-batch" in names:
        functional = _functional_copy(model)
        made["func-jvp-batch"] = lambda: response(_func_jvp_per_batch(stn, functional, x, target))
    return {name: made[name] for name in VARIANTS if name in names}


def _func_jvp_per_example(stn: SelfTuningNetwork, x: Tensor, target: Tensor) -> Tensor:
    """The response loss with ε per example, by torch.func.jvp in δ at 0 of the network with hyperlayers."""
    epsilon = stn.hparams.sample(len(x)).detach()
    graph = stn.graph("perturbed")  # batch statistics recomputed, none updated: torch.func.jvp refuses the update
    with held(stn.general_parameters()):
        y, dy = torch.func.jvp(  # type: ignore[misc]
            lambda delta: graph(x, condition=epsilon, delta=delta), (torch.zeros_like(epsilon),), (epsilon,)
        )
    return F.cross_entropy(y + dy, target)


def _functional_copy(model: nn.Module) -> nn.Module:
    copied = plain_baseline(model).train()
    for module in copied.modules():
        if isinstance(module, _NormBase):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return copied


def _func_jvp_per_batch(stn: SelfTuningNetwork, functional: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The same with one ε for the batch, so that Θε can be materialised and the original network used as it is."""
    weights = {name: parameter.detach() for name, parameter in functional.named_parameters()}
    changes = parameter_changes(stn.response, stn.hparams.sample(1)[0].detach())
    tangents = {name: changes.get(name, torch.zeros_like(weight)) for name, weight in weights.items()}
    y, dy = torch.func.jvp(lambda w: functional_call(functional, w, (x,)), (weights,), (tangents,))  # type: ignore[misc]
    return F.cross_entropy(y + dy, target)


def _inputs(batch_size: int, image_size: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    return x.to(device), torch.randint(classes, (batch_size,), generator=generator).to(device)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def step_times(
    steps: dict[str, Callable[[], None]], rounds: int, warmup: int, device: str, quiet: bool
) -> dict[str, float]:
    """Median seconds per inner step; the variants alternate within each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc="rounds", disable=True if quiet else None):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if number >= warmup:
                inner = TRAIN_STEPS if name.startswith("schedule") else 1
                times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Callable[[], None], device: str, steps: int = 3) -> float:
    """Peak MB over a few steps, minus what was held before the first. Meant for a fresh process."""
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
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _peak_kb() -> int:
    return _status_kb("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> int:
    """Resident kB now; Linux is asked to forget the peak of building the model."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_kb()
    return _status_kb("VmRSS:") or _peak_kb()


def _memory_in_fresh_process(settings: dict[str, Any], variant: str) -> float:
    code = f"from fxstn.bench import memory_of; print(memory_of({settings!r}, {variant!r}))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def memory_of(settings: dict[str, Any], variant: str) -> float:
    """Peak MB of one variant in this process."""
    from fxstn.cli import build_model

    torch.manual_seed(0)
    device = settings["device"]
    model = build_model(settings["model"], settings["classes"]).to(device)
    x, target = _inputs(settings["batch_size"], settings["image_size"], settings["classes"], device)
    return peak_memory(variants(model, x, target, [variant])[variant], device)


def bench(
    model: nn.Module,
    name: str,
    *,
    batch_size: int = 64,
    image_size: int = 32,
    classes: int = 10,
    names: Sequence[str] = VARIANTS,
    rounds: int = 15,
    warmup: int = 3,
    memory: bool = True,
    device: str = "cpu",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rows {'variant', 'step_ms', 'ratio', 'peak_mb'}, ratio against plain in the same run.

    Median over `rounds` rounds in which the variants alternate, optimiser steps included; a schedule's step is its mean
    over a cycle of 5 inner steps and one hyper step. peak_mb: from a fresh process each (None where memory=False).
    A variant that cannot run is reported with step_ms None and the reason.
    """
    if "plain" not in names:
        names = ("plain", *names)
    x, target = _inputs(batch_size, image_size, classes, device)
    steps = variants(model.to(device), x, target, names)
    failures: dict[str, str] = {}
    for variant in list(steps):
        try:
            steps[variant]()
        except Exception as error:  # torch.func.jvp cannot run every model; the others must not suffer for it
            failures[variant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del steps[variant]
    times = step_times(steps, rounds, warmup, device, quiet)
    settings = {"model": name, "batch_size": batch_size, "image_size": image_size, "classes": classes, "device": device}
    rows: list[dict[str, Any]] = []
    for variant, seconds in times.items():
        peak = round(_memory_in_fresh_process(settings, variant), 1) if memory else None
        ratio = round(seconds / times["plain"], 3)
        rows.append({"variant": variant, "step_ms": round(1e3 * seconds, 2), "ratio": ratio, "peak_mb": peak})
    rows += [
        {"variant": v, "step_ms": None, "ratio": None, "peak_mb": None, "failed": why} for v, why in failures.items()
    ]
    return rows


def environment(device: str) -> dict[str, Any]:
    """Where figures were taken: device, threads, versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: str | Path, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
