"""Checks of settings and other arguments: a group's wrong numbers are reported at once, before anything is trained."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fxstn.bilevel import distributed
from fxstn.bilevel.history import DIAGNOSTICS, LOSSES, SCALE
from fxstn.bilevel.schedule import Schedule
from fxstn.ir.input_errors import as_path, first_line, is_number

# Settings by their paths: "response.every" is `every` of `ResponseSettings`.
AT_LEAST_ONE = (
    "hyper.train_steps",
    "hyper.longest_cycle",
    "hyper.valid_steps",
    "response.every",
    "response.windows",
    "response.widening",
    "accumulate",
    "checkpoints.keep",
    "patience",
    "epoch_steps",
)
FRACTIONS = ("response.fraction", "hyper.fraction", "hyper.evaluation_share")
NOT_NEGATIVE = (
    "hyper.warmup_epochs",
    "hyper.entropy_weight",
    "hyper.inner_correction",
    "hyper.recalibrate",
    "checkpoints.rollbacks",
)
POSITIVE = ("clip_norm", "checkpoints.save_minutes")
OPTIONAL = ("clip_norm", "epoch_steps")  # numbers that may be None
WHOLE = ("hyper.train_steps", "hyper.longest_cycle", "hyper.valid_steps", "hyper.warmup_epochs",
         "hyper.recalibrate", "response.every", "response.windows", "accumulate", "checkpoints.keep",
         "checkpoints.rollbacks", "patience", "epoch_steps")  # fmt: skip
COLUMNS = ("epoch", "examples", *LOSSES, "seconds")  # of the history, which users may not name
KINDS: dict[str, tuple[Callable[[object], bool], str]] = {  # of settings that may be None
    **dict.fromkeys(("valid_loss_fn", "initial_state", "unpack"), (callable, "a function")),
    **dict.fromkeys(
        ("metrics", "columns", "schedulers", "step_schedulers"),
        (lambda value: isinstance(value, dict), "a dict by name"),
    ),
    "schedule": (lambda value: isinstance(value, Schedule), "a fxstn.Schedule, such as Schedule.from_json(path)"),
    "execution.memory_format": (lambda value: isinstance(value, torch.memory_format), "such as torch.channels_last"),
    "execution.compile": (
        lambda value: (
            isinstance(value, bool) or (isinstance(value, dict) and all(isinstance(key, str) for key in value))
        ),
        "True, False or a dict of torch.compile's options",
    ),
    **dict.fromkeys(("hyper.tune_scale", "progress"), (lambda value: isinstance(value, bool), "True or False")),
    "execution.autocast": (lambda value: isinstance(value, torch.dtype), "torch.bfloat16 or torch.float16"),
    "checkpoints.out_dir": (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
}
NEVER_NONE = ("hyper.tune_scale",)


def remark_on(perturb: object) -> str:
    """What is to be said of a choice of perturbations that is none: why it is none, and what has replaced an old word."""
    if perturb is None:
        return "; 'auto' has replaced None"
    if not isinstance(perturb, str):
        return ""
    replaced = "; 'off' has replaced 'none', which hyper_loss alone takes" if perturb == "none" else ""
    return f": the response is learned from perturbations only{replaced}" if perturb in ("off", "none") else ""


def plain_number(path: str, value: object) -> object:
    """A number as Python's own: NumPy's too, and 3.0 as 3 where a whole number is meant. Any other value as it is."""
    return (int(value) if path in WHOLE else float(value)) if is_number(value) else value


def check_settings(settings: Mapping[str, object]) -> None:
    """Raises ValueError that lists every number out of range, TypeError for a setting of another kind.

    settings: {path: value}, of some of the settings.
    """
    names = [name for name in (*AT_LEAST_ONE, *FRACTIONS, *NOT_NEGATIVE, *POSITIVE) if name in settings]
    names = [name for name in names if name not in OPTIONAL or settings[name] is not None]
    numbers = {name: value for name in names if is_number(value := settings[name])}
    if kinds := [f"{name}={settings[name]!r} must be a number" for name in names if name not in numbers]:
        raise TypeError("; ".join(kinds))
    _check_kinds(settings)
    if wrong := [*_wrong_numbers(numbers), *_wrong_choices(settings), *_wrong_together(numbers)]:
        raise ValueError("; ".join(wrong))
    _check_functions(settings)


def _wrong_numbers(numbers: Mapping[str, float]) -> list[str]:
    tests: list[tuple[Sequence[str], Callable[[float], bool], str]] = [
        (AT_LEAST_ONE, lambda number: number >= 1, "must be at least 1"),
        (FRACTIONS, lambda number: 0 < number <= 1, "must be in (0, 1]"),
        (NOT_NEGATIVE, lambda number: 0 <= number < math.inf, "must not be negative or infinite"),
        (POSITIVE, lambda number: number > 0, "must be positive"),
        (WHOLE, lambda number: not number > sys.maxsize, "is too large for a count"),
        (WHOLE, lambda number: float(number).is_integer(), "must be a whole number"),
    ]
    return [
        f"{name}={numbers[name]} {rule}"
        for names, right, rule in tests
        for name in names
        if name in numbers and not right(numbers[name])
    ]


def _wrong_choices(settings: Mapping[str, object]) -> list[str]:
    wrong = []
    ema, autocast = settings.get("ema"), settings.get("execution.autocast")
    perturb = settings.get("response.perturb", "auto")
    if ema is not None and not (is_number(ema) and 0 < ema < 1):
        wrong.append(f"ema={ema} must be in (0, 1)")
    if not isinstance(perturb, str) or perturb not in ("auto", "example", "batch"):
        wrong.append(f"response.perturb={perturb!r} must be 'auto', 'example' or 'batch'{remark_on(perturb)}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        wrong.append(f"execution.autocast={autocast} must be torch.bfloat16, torch.float16 or None")
    return wrong


def _wrong_together(numbers: Mapping[str, float]) -> list[str]:
    windows = numbers.get("response.windows", 1)
    if windows > 1 and numbers["response.every"] > 1:
        return [f"response.windows={windows} needs response.every=1, a step at every window"]
    return []


def check_windows(initial_state: object, windows: int, accumulate: int) -> None:
    """Raises ValueError where settings do not go with the state that a network carries, or does not carry.

    windows: of `ResponseSettings`.
    """
    if windows > 1 and initial_state is None:
        raise ValueError(f"response.windows={windows} needs initial_state: without it no window goes on from the last")
    if accumulate > 1 and initial_state is not None:
        raise ValueError(
            f"accumulate={accumulate} does not go with initial_state: a window needs the state after the last"
        )


def _check_kinds(settings: Mapping[str, object]) -> None:
    """Raises TypeError for a setting of another kind than it must be, ValueError for an out_dir that is a file."""
    for name, (right, kind) in KINDS.items():
        value = settings.get(name)
        if (value is not None or (name in NEVER_NONE and name in settings)) and not right(value):
            dicts = name in ("metrics", "columns") and callable(value)
            remedy = f"; give {{{getattr(value, '__name__', name)!r}: {name_of(value)}}}" if dicts else ""
            raise TypeError(f"{name}={value!r} must be {kind}{'' if name in NEVER_NONE else ', or None'}{remedy}")
    out_dir = settings.get(name := "checkpoints.out_dir")
    if out_dir is not None and as_path(out_dir, name).is_file():
        raise ValueError(f"{name}={str(out_dir)!r} is a file; name a folder, which is made where there is none")


def name_of(function: object) -> str:
    """How a user writes a function: "fxstn.accuracy", or an object as it prints itself."""
    name = getattr(function, "__name__", None)
    own = str(getattr(function, "__module__", "")).startswith("fxstn.")
    return repr(function) if name is None else f"{'fxstn.' * own}{name}"


def _entries(settings: Mapping[str, object], argument: str) -> list[tuple[str, object]]:
    """Those of a dict; none of what is no dict, which another check refuses."""
    functions = settings.get(argument)
    return list(functions.items()) if isinstance(functions, dict) else []


def _check_functions(settings: Mapping[str, object]) -> None:
    for argument in ("metrics", "columns"):
        for name, function in _entries(settings, argument):
            if not callable(function):
                raise TypeError(f"{argument}[{name!r}] must be a function, got {type(function).__name__}")
            if is_own_column(name) or (argument == "columns" and name in dict(_entries(settings, "metrics"))):
                raise ValueError(f"{argument}[{name!r}]: the history has a column of that name; choose another")
    callbacks = settings.get("callbacks", ())
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        remedy = f"; give [{name_of(callbacks)}]" if callable(callbacks) else ""
        raise TypeError(f"callbacks={callbacks!r} must be a list of functions of the run{remedy}")


def is_own_column(name: str) -> bool:
    """Whether the history itself may have a column of this name."""
    return name in COLUMNS or name in DIAGNOSTICS or name.startswith(SCALE)


def check_names(
    names: Sequence[str],
    metrics: Mapping[str, object] | None,
    columns: Mapping[str, object] | None,
    schedule: Schedule | None,
) -> None:
    """Raises ValueError where a hyperparameter has the name of another column of the history, or the schedule is of others.

    names: of the hyperparameters.
    metrics, columns, schedule: of the run.
    """
    others = dict.fromkeys(metrics or (), "metric") | dict.fromkeys(columns or (), "column")
    for name in names:
        if kind := "column" if is_own_column(name) else others.get(name):
            raise ValueError(f"the hyperparameter {name!r} has the name of a {kind} of the history; choose another")
    if schedule is not None and set(schedule.values) != set(names):
        raise ValueError(f"schedule is of {', '.join(schedule.values)}, the network has {', '.join(names)}; give one of the "
                         "same hyperparameters")  # fmt: skip


def check_device(device: torch.device | str, name: str) -> torch.device:
    """The device.

    name: what the error calls the argument.

    Raises ValueError where it is not there.
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        others = [
            "cpu",
            *(["cuda"] if torch.cuda.is_available() else []),
            *(["mps"] if torch.backends.mps.is_available() else []),
        ]
        raise ValueError(
            f"{name}={str(device)!r} cannot be used here: {first_line(error)}; there is {' and '.join(others)}"
        ) from error


def check_length(epochs: object, minutes: object) -> None:
    """Of a run. Raises TypeError for what is no number, ValueError for one out of range."""
    if not is_number(epochs) or not (minutes is None or is_number(minutes)):
        raise TypeError(f"fit takes a number of epochs, and minutes or None; got {epochs!r} and {minutes!r}")
    if not (epochs >= 0 and float(epochs).is_integer()):
        raise ValueError(
            f"fit: epochs={epochs} must be a whole number, 0 or more: that of all epochs, those done included"
        )
    if minutes is not None and not minutes > 0:
        raise ValueError(f"fit: minutes={minutes} must be positive, or None for no limit")


def check_synced_norms(stn: nn.Module) -> None:
    """Raises ValueError where a norm over processes would see one of them only."""
    frontend = getattr(stn, "frontend", "fx")
    if distributed.processes() > 1 and frontend != "fx" and any(isinstance(m, nn.SyncBatchNorm) for m in stn.modules()):
        raise ValueError(f"SyncBatchNorm normalises over processes in a network followed by trace='fx'; this one is "
                         f"{frontend!r}, which sees its own process only: see stn.rejected, or keep BatchNorm")  # fmt: skip


def check_no_float16(module: nn.Module) -> None:
    """Raises ValueError where float16 autocast would have to scale gradients that are in float16 themselves."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype is torch.float16:
            raise ValueError(
                f"execution.autocast=torch.float16 is for a network in float32, and {name} is in float16: leave out "
                ".half(), or freeze that layer"
            )
