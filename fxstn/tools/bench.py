"""fxstn bench: what tuning costs, as a ratio to plain training with fixed dropout at the same places."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

from fxstn import hp
from fxstn.bilevel.cadence import steps_of_run
from fxstn.bilevel.files import json_text, write_text
from fxstn.bilevel.optimizers import adam, sgd
from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.symbolic import Symbolic
from fxstn.ir.copies import deep_copy
from fxstn.ir.input_errors import as_file
from fxstn.passes.match import bind
from fxstn.passes.recipe import canonical_graphs
from fxstn.tools.baselines import double_backward, func_jvp_per_batch, func_jvp_per_example, without_statistics
from fxstn.tools.choices import VARIANTS
from fxstn.tools.measure import peak_memory, step_times
from fxstn.tools.status import RunFailed
from fxstn.tools.workloads import TRAIN_STEPS, Setup, Stepper, TunedLoop, TunedTraining

SHORT, LONG, PERIOD = 1000, 10_000, 40  # inner steps of runs, and of a round of their schedules
BASELINES = {"func-jvp", "func-jvp-batch", "double-backward"}
Steps = dict[str, tuple[Callable[[], None], int]]  # name → (what to run, inner steps that it does)
Row = dict[str, str | int | float | bool | None]
Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class FixedDropout:
    """A forward hook: plain dropout after a module."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> object:
        return F.dropout(output, self.p, module.training) if isinstance(output, Tensor) else output


class FixedInputDropout(FixedDropout):
    """A forward pre-hook: plain dropout before a module."""

    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object = None) -> object:
        return super().__call__(module, (), inputs[0]), *inputs[1:]


def plain_baseline(model: nn.Module, hparams: Sequence[hp.Spec] | None = None) -> nn.Module:
    """The original model with torch's own dropout, at fixed rates, wherever `hparams` tunes one."""
    model = deep_copy(model)
    graph, _ = canonical_graphs(Symbolic(), model, tuple(frozen_modules(model)), None)
    binding = bind(graph, hparams)
    dropouts = [site for site in binding.sites if isinstance(site.spec, hp.Dropout)]  # others the model has itself
    rates = {site.path: binding.hyperparameters[site.index].init for site in dropouts}
    for path, p in rates.items():
        if path == "input":
            model.register_forward_pre_hook(FixedInputDropout(p))
            continue
        module = model.get_submodule(path)
        if isinstance(module, _DropoutNd):
            module.p = p
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = p
        else:
            module.register_forward_hook(FixedDropout(p))
    return model


def variants(setup: Setup, names: Sequence[str]) -> Steps:
    """The named variants, each with its optimizer's step.

    They have a structured response, SGD with momentum and the paper's settings. "schedule-default" and "schedule-long" have
    those of the runner, with the response and hyper steps of the first `SHORT`, or `LONG`, inner steps of a run, on average.
    """
    model, x, target = setup.build()
    steps: Steps = {}
    if "plain" in names:
        plain = plain_baseline(model, setup.hparams()).train()
        run = torch.compile(plain) if setup.compile else plain
        plain_step = Stepper(setup, sgd(list(plain.parameters())))
        steps["plain"] = partial(plain_step, lambda: F.cross_entropy(run(x), target)), 1
    if not {"plain", "schedule-default", "schedule-long", "tune"}.issuperset(names):
        paper = TunedTraining(setup, model, x, target, "structured", sgd)
        steps["general"] = paper.general, 1
        steps["response"] = paper.response, 1
        steps["schedule"] = partial(paper.cycle, TRAIN_STEPS, TRAIN_STEPS, 1, "auto", False), TRAIN_STEPS
    if not {"schedule-default", "schedule-long"}.isdisjoint(names):
        default = TunedTraining(setup, model, x, target, "scaled", adam)
        for name, inner in (("schedule-default", SHORT), ("schedule-long", LONG)):
            responses, hypers = (round(PERIOD * count / inner) for count in steps_of_run(inner))
            steps[name] = partial(default.cycle, PERIOD, responses, hypers, "off", True), PERIOD
    if "tune" in names:
        steps["tune"] = partial(TunedLoop(setup).cycle, PERIOD), PERIOD
    if not BASELINES.isdisjoint(names):
        original = without_statistics(plain_baseline(model, setup.hparams()))
        losses: dict[str, Callable[[], Tensor]] = {
            "func-jvp": partial(func_jvp_per_example, paper.stn, x, target),
            "func-jvp-batch": partial(func_jvp_per_batch, paper.stn, original, x, target),
            "double-backward": partial(double_backward, paper.stn, original, x, target),
        }
        steps |= {name: (partial(paper.step_response, loss), 1) for name, loss in losses.items()}
    return {name: steps[name] for name in VARIANTS if name in names}


def memory_of(setup: Setup, variant: str) -> float:
    """Peak MB of one variant in this process."""
    return peak_memory(variants(setup, [variant])[variant][0], setup.device)


def _memory_in_fresh_process(setup: Setup, variant: str) -> float:
    code = f"from fxstn.tools.bench import Setup, memory_of; print(memory_of(Setup(**{asdict(setup)!r}), {variant!r}))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunFailed(f"measuring the memory of {variant} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def _failures(steps: Steps, bar: tqdm) -> dict[str, str]:
    """{variant: reason} of those that cannot run once. bar: shows which runs."""
    failures = {}
    for variant, (step, _) in steps.items():
        bar.set_description(f"first step of {variant}")
        try:
            step()
        except Exception as error:  # torch.func.jvp cannot run every model; the others must not suffer for it
            failures[variant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        bar.update()
    return failures


def bench(
    setup: Setup,
    *,
    names: Sequence[str] = VARIANTS,
    rounds: int = 15,
    warmup: int = 3,
    memory: Sequence[str] = VARIANTS,
    quiet: bool = False,
) -> list[Row]:
    """Rows {'variant', 'step_ms', 'ratio', 'peak_mb'} and the setup. ratio is against plain training in the same run.

    names: variants; plain training always runs.
    rounds, warmup: rounds in which the variants alternate. step_ms is the median over the rounds after the warmup, optimizer
        steps included; a schedule's step is its mean over whole cycles of inner and hyper steps.
    memory: variants whose peak_mb is measured, in a fresh process each; None for the others.

    A variant that cannot run has step_ms None and a reason, 'failed'. Raises ValueError where plain training cannot run.
    """
    hidden = True if quiet else None  # None: on a terminal only
    with tqdm(total=1 + len({"plain", *names}), desc="build", leave=False, disable=hidden) as bar:
        steps = variants(setup, ("plain", *names))
        bar.update()
        failures = _failures(steps, bar)
    if "plain" in failures:
        raise ValueError(f"plain training of {setup.model} fails on {setup.batch_size} images of {setup.image_size} pixels: "
                         f"{failures['plain']}; choose others")  # fmt: skip
    times = step_times({k: v for k, v in steps.items() if k not in failures}, rounds, warmup, setup.device, quiet)
    rows: list[Row] = []
    for variant in (bar := tqdm(steps, leave=False, disable=hidden)):
        bar.set_description(f"memory of {variant}")
        row: Row = {"variant": variant, "step_ms": None, "ratio": None, "peak_mb": None}
        if variant in failures:
            row["failed"] = failures[variant]
        else:
            row["step_ms"] = round(1e3 * times[variant], 2)
            row["ratio"] = round(times[variant] / times["plain"], 3)
            row["peak_mb"] = round(_memory_in_fresh_process(setup, variant), 1) if variant in memory else None
        rows.append(row | asdict(setup) | environment(setup.device))
    return rows


def environment(device: str) -> Row:
    """Where figures were taken: device, threads, versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: str | Path, rows: list[Row]) -> None:
    write_text(as_file(path, "--json"), json_text(rows, indent=1) + "\n")
