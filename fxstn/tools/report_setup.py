"""Sections of a report on how a run was set up: settings, versions, seeds, and the command that repeats it."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sized
from html import escape
from importlib import metadata
from pathlib import Path

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.optim import SettlingAdam, learning_rate
from fxstn.bilevel.run import Run
from fxstn.tools.markup import details, pairs, table
from fxstn.tools.version import version

COSTLY = ("hyper.train_steps", "hyper.longest_cycle", "hyper.valid_steps", "hyper.fraction", "response.every",
          "response.fraction", "response.windows", "response.perturb", "hyper.evaluation_share", "accumulate",
          "execution.compile", "execution.autocast", "execution.memory_format")  # fmt: skip
HIDDEN = ("lr", "gap", "limited")  # of an optimizer: shown otherwise, or the state of a run


def _optimizer(runner: Run, name: str, optimizer: torch.optim.Optimizer) -> list[str]:
    """A row of the table of optimizers.

    name: that of the runner's argument.
    """
    group = optimizer.param_groups[0]
    first = group["lr"] if isinstance(optimizer, SettlingAdam) else optimizer.defaults.get("lr")
    rate = group.get("initial_lr", first)
    options = {key: group[key] for key in optimizer.defaults if key not in HIDDEN and key in group}
    text = ", ".join(f"{key} {value}" for key, value in options.items() if value not in (None, False, 0))
    updates = runner.updates
    schedulers = [type(part[name]) for part in (updates.schedulers, updates.step_schedulers) if name in part]
    size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return [
        name,
        type(optimizer).__name__,
        f"{size:,} parameters",
        f"{rate} → {learning_rate(optimizer):.4g}",
        text,
        ", ".join(scheduler.__name__ for scheduler in schedulers),
    ]


def settings_section(runner: Run) -> str:
    rows = [_optimizer(runner, name, optimizer) for name, optimizer in runner.optimizers.items()]
    optimizers = table(("argument", "optimizer", "of", "lr, first → last", "others", "scheduler"), rows)
    data = {"training data": _data(runner.train_loader), "validation data": _data(runner.valid_loader)}
    elsewhere = (*COSTLY, *runner.optimizers, "train_loader", "valid_loader")
    others = data | {name: text for name, text in runner.settings.items() if name not in elsewhere}
    unset = [name for name, text in others.items() if text == "None"]
    shown = pairs((name, text) for name, text in others.items() if name not in unset)
    return optimizers + shown + (f"<p>Not set: {', '.join(unset)}.</p>" if unset else "")


def _data(loader: object) -> str:
    """Its type, and how many batches of what size it has, where it knows."""
    try:
        batches = f", {len(loader):,} batches" if isinstance(loader, Sized) else ""
    except TypeError:  # an IterableDataset without a length
        batches = ""
    size = getattr(loader, "batch_size", None)
    return type(loader).__name__ + batches + (f" of {size}" if batches and size else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _environment(runner: Run) -> list[tuple[str, str]]:
    device = str(runner.device)
    if runner.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(runner.device)})"
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return [("fxstn", version()), ("torch", torch.__version__), ("torchvision", _version("torchvision")),
            ("Python", platform.python_version()), ("platform", platform.platform()), ("device", device),
            ("CPU threads", str(torch.get_num_threads())), ("processes", str(distributed.processes())),
            ("report written", now)]  # fmt: skip


def _seeds(runner: Run) -> list[tuple[str, str]]:
    """Seeds of the global generator and of those of the loaders."""
    generators = {"torch": torch.default_generator}
    for name in ("train_loader", "valid_loader"):
        generators[name] = getattr(getattr(runner, name, None), "generator", None) or generators["torch"]
    seeds = {name: generator.initial_seed() for name, generator in generators.items()}
    return [(f"seed of {name}", str(seed)) for name, seed in seeds.items() if name == "torch" or seed != seeds["torch"]]


def _command() -> str:
    """What was typed in the shell; "" where there is nothing of the kind, as in a notebook."""
    program, *words = sys.argv
    path = Path(program)
    if program in ("", "-", "-c") or path.name.startswith(("ipykernel", "colab_kernel")):
        return ""
    if path.name == "fxstn" or path.parts[-2:] == ("fxstn", "__main__.py"):
        return shlex.join(["fxstn", *words])
    here = path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path
    return shlex.join(["python", str(here), *words])


def _code(text: str) -> str:
    """A long line scrolls, by keys too."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def repeat_section(runner: Run) -> str:
    """Command, versions and seeds; the values, to copy."""
    command = _command()
    code = (
        _code(command)
        if command
        else "<p>No command started the run: it is of a notebook, or of an interactive Python.</p>"
    )
    values = json.dumps(runner.history.outcome().values, indent=1, ensure_ascii=False)
    replay = ("<p><code>runner.refit(loader)</code> trains anew at these values; so does a run with "
              "<code>schedule=fxstn.Schedule({name: [value]})</code>.</p>")  # fmt: skip
    copied = details("The values, to copy", f"{_code(values)}{replay}")
    return code + pairs([*_environment(runner), *_seeds(runner)]) + copied
