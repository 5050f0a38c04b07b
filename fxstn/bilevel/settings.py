"""Arguments of a BilevelRunner that cannot be meant: everything wrong is said at once, before anything is trained."""

from __future__ import annotations

import inspect
import math
import os
from functools import partial
from pathlib import Path, PurePath
from types import GeneratorType
from typing import Any

import torch
from torch import nn

from fxstn.bilevel import distributed
from fxstn.bilevel.history import LOSSES
from fxstn.bilevel.schedule import Schedule
from fxstn.ir.input_errors import first_line

AT_LEAST_ONE = (
    "train_steps",
    "valid_steps",
    "response_every",
    "response_windows",
    "response_widening",
    "accumulate",
    "keep",
)
FRACTIONS = ("response_fraction", "hyper_fraction")
NOT_NEGATIVE = ("warmup_epochs", "entropy_weight", "inner_correction", "rollbacks", "recalibrate")
POSITIVE = ("clip_norm", "patience", "save_minutes")  # None: not set
WHOLE = ("train_steps", "valid_steps", "response_every", "response_windows", "accumulate", "keep", "warmup_epochs", "rollbacks",
         "recalibrate", "patience")  # fmt: skip
FUNCTIONS = ("valid_loss_fn", "initial_state", "unpack")  # or None
DICTS = ("metrics", "columns", "schedulers", "step_schedulers")  # or None
COLUMNS = ("epoch", "examples", *LOSSES, "seconds")  # the runner's own

OF_NETWORKS = (
    "valid_loss_fn",
    "initial_state",
    "schedule",
    "compile",
    "perturb",
    "tune_scale",
)  # nothing to a BilevelProblem


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError that lists every setting out of range, TypeError for a kind that cannot be meant."""
    numbers = (*AT_LEAST_ONE, *FRACTIONS, *NOT_NEGATIVE, *(name for name in POSITIVE if settings[name] is not None))
    if kinds := [f"{name}={settings[name]!r} must be a number" for name in numbers if not _number(settings[name])]:
        raise TypeError("; ".join(kinds))
    _check_kinds(settings)
    told = {name: settings[name] for name in numbers}
    wrong = [f"{name}={told[name]} must be at least 1" for name in AT_LEAST_ONE if not told[name] >= 1]
    wrong += [f"{name}={told[name]} must be in (0, 1]" for name in FRACTIONS if not 0 < told[name] <= 1]
    wrong += [
        f"{name}={told[name]} must not be negative or infinite"
        for name in NOT_NEGATIVE
        if not 0 <= told[name] < math.inf
    ]
    wrong += [f"{name}={told[name]} must be positive" for name in POSITIVE if name in told and not told[name] > 0]
    wrong += [
        f"{name}={told[name]} must be a whole number"
        for name in WHOLE
        if name in told and not float(told[name]).is_integer()
    ]
    ema, perturb, autocast = settings["ema"], settings["perturb"], settings["autocast"]
    if ema is not None and not (_number(ema) and 0 < ema < 1):
        wrong.append(f"ema={ema} must be in (0, 1)")
    if perturb not in (None, "example", "batch"):
        wrong.append(f"perturb={perturb!r} must be 'example', 'batch' or None")
    if autocast not in (None, torch.bfloat16, torch.float16):
        wrong.append(f"autocast={autocast} must be torch.bfloat16, torch.float16 or None")
    if told["response_windows"] > 1 and (settings["initial_state"] is None or told["response_every"] > 1):
        wrong.append(f"response_windows={told['response_windows']} needs initial_state and response_every=1, a step at every "
                     "window")  # fmt: skip
    if told["accumulate"] > 1 and settings["initial_state"] is not None:
        wrong.append(
            f"accumulate={told['accumulate']} does not go with initial_state: a window needs the state after the last"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    for name in ("metrics", "columns"):
        if bad := [key for key, function in settings[name].items() if not callable(function)]:
            raise TypeError(f"{name}[{bad[0]!r}] must be a function, got {type(settings[name][bad[0]]).__name__}")
        if taken := [key for key in settings[name] if key in COLUMNS]:
            raise ValueError(f"{name}[{taken[0]!r}]: the history has a column of that name; choose another")
    callbacks = settings["callbacks"]
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks={callbacks!r} must be a list of functions of the runner")


def _check_kinds(settings: dict[str, Any]) -> None:
    """Raises TypeError for an argument that is not a number and of another kind than it must be, ValueError for an out_dir
    that is a file."""
    kinds: dict[str, tuple[Any, str]] = {
        **dict.fromkeys(FUNCTIONS, (callable, "a function")),
        **{name: (lambda value: isinstance(value, dict), "a dict by name") for name in DICTS},
        "schedule": (lambda value: isinstance(value, Schedule), "a fxstn.Schedule, such as Schedule.from_json(path)"),
        "memory_format": (lambda value: isinstance(value, torch.memory_format), "such as torch.channels_last"),
        "compile": (lambda value: isinstance(value, (bool, dict)), "True, False or a dict of torch.compile's options"),
        "out_dir": (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
    }
    for name, (right, what) in kinds.items():
        if settings[name] is not None and not right(settings[name]):
            raise TypeError(f"{name}={settings[name]!r} must be {what}, or None")
    if settings["out_dir"] is not None and Path(settings["out_dir"]).is_file():
        raise ValueError(
            f"out_dir={str(settings['out_dir'])!r} is a file; name a folder, which is made where there is none"
        )


def check_device(device: Any, name: str = "device") -> torch.device:
    """A device that is there. Raises ValueError for any other."""
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


def check_loss(loss_fn: Any, name: str) -> None:
    """Raises TypeError for what cannot be called with (output, target), and with `hparams` where it takes them."""
    if isinstance(loss_fn, type):
        raise TypeError(f"{name} is the class {loss_fn.__name__}, not a function; make one: {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(f"{name} must be a function of (output, target), got {type(loss_fn).__name__}")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(None, None, **({"hparams": None} if "hparams" in signature.parameters else {}))
    except TypeError as error:
        raise TypeError(f"{name} must be a function of (output, target), or (output, target, hparams); its arguments are "
                        f"{signature}: {error}") from error  # fmt: skip


def check_length(epochs: Any, minutes: Any) -> None:
    """Of a run. Raises TypeError for what is no number, ValueError for one out of range."""
    if not _number(epochs) or not (minutes is None or _number(minutes)):
        raise TypeError(f"fit takes a number of epochs, and minutes or None; got {epochs!r} and {minutes!r}")
    if not (epochs >= 0 and float(epochs).is_integer()):
        raise ValueError(
            f"fit: epochs={epochs} must be a whole number, 0 or more: that of all epochs, those done included"
        )
    if minutes is not None and not minutes > 0:
        raise ValueError(f"fit: minutes={minutes} must be positive, or None for no limit")


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are plain values: what all processes of a run must have in common. Each has its own device."""
    own = ("device", "out_dir", "progress")
    plain = (bool, int, float, str, torch.dtype, torch.memory_format, type(None))
    return {name: value for name, value in settings.items() if isinstance(value, plain) and name not in own}


def check_loader(loader: Any, name: str) -> int | None:
    """How many batches it has, where it knows. Raises TypeError for what is no iterable of batches, ValueError for one that is
    empty or allows one pass at a time."""
    if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, dict, torch.Tensor)):
        raise TypeError(f"{name} must be a DataLoader or another iterable of batches, got {type(loader).__name__}; "
                        "DataLoader(dataset, batch_size=64) makes one of a data set")  # fmt: skip
    if isinstance(loader, (GeneratorType, zip, map)):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which yields its batches once; give a DataLoader, or a list of them"
        )
    if getattr(loader, "persistent_workers", False) and name == "valid_loader":
        raise ValueError("valid_loader has persistent_workers=True, which allows one pass at a time; the hyper steps and the "
                         "evaluation are two: set it to False")  # fmt: skip
    try:
        batches = len(loader)
    except TypeError:  # an IterableDataset does not know it
        return None
    if batches == 0:
        raise ValueError(f"{name} is empty: it yields no batch (fewer examples than batch_size with drop_last?)")
    return batches


def _text(value: Any) -> str:
    if isinstance(value, partial):
        return f"{_text(value.func)}({', '.join([*map(repr, value.args), *(f'{k}={v!r}' for k, v in value.keywords.items())])})"
    if isinstance(value, dict):
        return (
            ", ".join(f"{key}: {_text(held)}" if not callable(held) else str(key) for key, held in value.items())
            or "none"
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, (int, float, str, torch.dtype, torch.memory_format, torch.device, PurePath)):
        return str(value)
    return getattr(value, "__name__", None) or type(value).__name__


def described(settings: dict[str, Any]) -> dict[str, str]:
    """The settings of a run for a reader: numbers as they are, functions and objects by name."""
    return {name: _text(value) for name, value in settings.items() if name not in ("self", "stn")}


def check_synced_norms(stn: Any) -> None:
    """Raises ValueError where a norm over processes would see one of them only."""
    frontend = getattr(stn, "frontend", "fx")
    if distributed.processes() > 1 and frontend != "fx" and any(isinstance(m, nn.SyncBatchNorm) for m in stn.modules()):
        raise ValueError(f"SyncBatchNorm normalises over processes in a network followed by trace='fx'; this one is "
                         f"{frontend!r}, which sees its own process only: see stn.rejected, or keep BatchNorm")  # fmt: skip
