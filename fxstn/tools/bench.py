"""fxstn bench: what tuning costs, as a ratio to plain training with fixed dropout at the same places."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fxstn import hp
from fxstn.bilevel.batches import part, placed
from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.optimizers import adam, sgd
from fxstn.bilevel.runner import DEFAULT_RESPONSE_EVERY, DEFAULT_RESPONSE_FRACTION
from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.symbolic import Symbolic
from fxstn.passes.match import bind
from fxstn.passes.recipe import canonical_graphs
from fxstn.tools.baselines import double_backward, func_jvp_per_batch, func_jvp_per_example, without_statistics
from fxstn.tools.choices import VARIANTS
from fxstn.tools.measure import peak_memory, step_times
from fxstn.tools.models import build_model
from fxstn.transform import transform

TRAIN_STEPS = 5
Steps = dict[str, tuple[Callable[[], None], int]]  # name → (what to run, inner steps that it does)


@dataclass(frozen=True)
class Setup:
    """What is measured: a model by name (or 'package.module:function'), its input, and how it is run.

    tuned: "dropout" (hparams=None), "weight-decay" (one per layer), or a number of hyperparameters that only the loss could
    read, which cost what any cost in the response. compile, bf16, channels_last: for every variant, plain too. recompute:
    activation checkpointing in the response and hyper steps.
    """

    model: str
    batch_size: int = 64
    image_size: int = 32
    classes: int = 10
    device: str = "cpu"
    tuned: str | int = "dropout"
    compile: bool = False
    bf16: bool = False
    channels_last: bool = False
    recompute: bool = False

    def hparams(self) -> list[hp.Spec] | None:
        if self.tuned == "weight-decay":
            return [hp.WeightDecay("*")]
        return None if self.tuned == "dropout" else [hp.Scalar(f"s{i}", 0.5, 0, 1) for i in range(int(self.tuned))]

    def built(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(model in train mode, a batch of images, its classes)."""
        torch.manual_seed(0)
        model = build_model(self.model, self.classes).to(self.device).train()
        x = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        target = torch.randint(self.classes, (self.batch_size,))
        layout = torch.channels_last if self.channels_last else None
        if layout:
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
        return model, *placed((x, target), torch.device(self.device), layout)


class _FixedDropout:
    """A forward hook: plain dropout after a module."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        return F.dropout(output, self.p, module.training) if isinstance(output, Tensor) else output


def plain_baseline(model: nn.Module, hparams: Sequence[hp.Spec] | None = None) -> nn.Module:
    """The original model with torch's own dropout, at fixed rates, wherever `hparams` tunes one."""
    model = copy.deepcopy(model)
    graph, _ = canonical_graphs(Symbolic(), model, tuple(frozen_modules(model)), None)
    binding = bind(graph, hparams)
    dropouts = [site for site in binding.sites if isinstance(site.spec, hp.Dropout)]  # others the model has itself
    rates = {site.path: binding.hyperparameters[site.index].init for site in dropouts}
    for path, p in rates.items():
        if path == "input":
            model.register_forward_pre_hook(
                lambda module, inputs, p=p: (F.dropout(inputs[0], p, module.training), *inputs[1:])
            )
            continue
        module = model.get_submodule(path)
        if isinstance(module, _DropoutNd):
            module.p = p
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = p
        else:
            module.register_forward_hook(_FixedDropout(p))
    return model


def variants(setup: Setup, names: Sequence[str]) -> Steps:
    """The named variants, each with its optimizer's step: a structured response, SGD with momentum and the paper's settings;
    for "schedule-default" those of the runner."""
    model, x, target = setup.built()
    precision = partial(torch.autocast, setup.device, torch.bfloat16, enabled=setup.bf16)

    def stepper(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
        def step(
            loss_of: Callable[..., Tensor], *arguments: Any, before: Callable[[], Any] | None = None, **settings: Any
        ) -> None:
            with precision():
                loss = loss_of(*arguments, **settings)
            loss.backward()
            if before is not None:
                before()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def steps_of(kind: str, learn: Callable[..., torch.optim.Optimizer]) -> tuple[Any, ...]:
        stn = transform(model, setup.hparams(), response=kind, recompute=setup.recompute).train()
        if setup.compile:
            stn.compile()
        parameters = list(stn.general_parameters()), list(stn.response_parameters()), list(stn.hparams.parameters())
        optimizers = sgd(parameters[0]), learn(parameters[1]), torch.optim.RMSprop(parameters[2], lr=1e-3)
        return stn, *map(stepper, optimizers)

    def cycle(made: tuple[Any, ...], fraction: float, every: int, perturb: str | None, corrected: bool) -> None:
        stn, general, response, hyper = made
        for number in range(math.lcm(TRAIN_STEPS, every)):
            general(general_loss, stn, F.cross_entropy, x, target, before=stn.hypergradient if corrected else None)
            if (number + 1) % every == 0:
                response(response_loss, stn, F.cross_entropy, *part((x, target), fraction))
            if (number + 1) % TRAIN_STEPS == 0:
                hyper(hyper_loss, stn, F.cross_entropy, x, target, perturb=perturb)

    made: Steps = {}
    if "plain" in names:
        plain = plain_baseline(model, setup.hparams()).train()
        run = torch.compile(plain) if setup.compile else plain
        plain_step = stepper(sgd(list(plain.parameters())))
        made["plain"] = lambda: plain_step(lambda: F.cross_entropy(run(x), target)), 1
    if not {"plain", "schedule-default"}.issuperset(names):
        faithful = stn, general, response, _ = steps_of("structured", sgd)
        made["general"] = partial(general, general_loss, stn, F.cross_entropy, x, target), 1
        made["response"] = partial(response, response_loss, stn, F.cross_entropy, x, target), 1
        made["schedule"] = partial(cycle, faithful, 1.0, 1, None, False), TRAIN_STEPS
    if "schedule-default" in names:
        every = DEFAULT_RESPONSE_EVERY
        settings = (DEFAULT_RESPONSE_FRACTION, every, "none", True)
        made["schedule-default"] = partial(cycle, steps_of("scaled", adam), *settings), math.lcm(TRAIN_STEPS, every)
    if not {"func-jvp", "func-jvp-batch", "double-backward"}.isdisjoint(names):
        original = without_statistics(plain_baseline(model, setup.hparams()))
        made["func-jvp"] = partial(response, func_jvp_per_example, stn, x, target), 1
        made["func-jvp-batch"] = partial(response, func_jvp_per_batch, stn, original, x, target), 1
        made["double-backward"] = partial(response, double_backward, stn, original, x, target), 1
    return {name: made[name] for name in VARIANTS if name in names}


def memory_of(setup: Setup, variant: str) -> float:
    """Peak MB of one variant in this process."""
    return peak_memory(variants(setup, [variant])[variant][0], setup.device)


def _memory_in_fresh_process(setup: Setup, variant: str) -> float:
    code = f"from fxstn.tools.bench import Setup, memory_of; print(memory_of(Setup(**{asdict(setup)!r}), {variant!r}))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def bench(
    setup: Setup,
    *,
    names: Sequence[str] = VARIANTS,
    rounds: int = 15,
    warmup: int = 3,
    memory: Sequence[str] = VARIANTS,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rows {'variant', 'step_ms', 'ratio', 'peak_mb'} and the setup; ratio against plain in the same run.

    Median over `rounds` rounds in which the variants alternate, optimiser steps included; a schedule's step is its mean
    over whole cycles of inner and hyper steps. peak_mb: from a fresh process each, for the variants in `memory`, else None.
    A variant that cannot run is reported with step_ms None and the reason. Raises ValueError where plain training cannot.
    """
    steps = variants(setup, ("plain", *names))
    failures: dict[str, str] = {}
    for variant in list(steps):
        try:
            steps[variant][0]()
        except Exception as error:  # torch.func.jvp cannot run every model; the others must not suffer for it
            failures[variant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del steps[variant]
    if "plain" in failures:
        raise ValueError(f"plain training of {setup.model} fails on {setup.batch_size} images of {setup.image_size} pixels: "
                         f"{failures['plain']}; choose others")  # fmt: skip
    times = step_times(steps, rounds, warmup, setup.device, quiet)
    shared = asdict(setup) | environment(setup.device)
    rows: list[dict[str, Any]] = []
    for variant in [name for name in VARIANTS if name in (*times, *failures)]:
        row: dict[str, Any] = {"variant": variant, "step_ms": None, "ratio": None, "peak_mb": None}
        if variant in failures:
            row["failed"] = failures[variant]
        else:
            row["step_ms"] = round(1e3 * times[variant], 2)
            row["ratio"] = round(times[variant] / times["plain"], 3)
            row["peak_mb"] = round(_memory_in_fresh_process(setup, variant), 1) if variant in memory else None
        rows.append(row | shared)
    return rows


def environment(device: str) -> dict[str, Any]:
    """Where figures were taken: device, threads, versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: str | Path, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
