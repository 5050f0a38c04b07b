"""Arguments of a BilevelRunner that cannot be meant: everything wrong is said at once, before anything is trained."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath
from typing import Any

import torch

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
NOT_NEGATIVE = ("warmup_epochs", "entropy_weight", "inner_correction", "rollbacks")
POSITIVE = ("clip_norm", "patience", "save_minutes")  # None: not set
WHOLE = ("train_steps", "valid_steps", "response_every", "response_windows", "accumulate", "keep", "warmup_epochs", "rollbacks",
         "patience")  # fmt: skip

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
    told = {name: settings[name] for name in numbers}
    wrong = [f"{name}={told[name]} must be at least 1" for name in AT_LEAST_ONE if not told[name] >= 1]
    wrong += [f"{name}={told[name]} must be in (0, 1]" for name in FRACTIONS if not 0 < told[name] <= 1]
    wrong += [f"{name}={told[name]} must not be negative" for name in NOT_NEGATIVE if not told[name] >= 0]
    wrong += [f"{name}={told[name]} must be positive" for name in POSITIVE if name in told and not told[name] > 0]
    wrong += [
        f"{name}={told[name]} must be a whole number"
        for name in WHOLE
        if name in told and told[name] != int(told[name])
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
    if any(not callable(callback) for callback in settings["callbacks"]):
        raise TypeError("callbacks must be functions of the runner")


def check_loader(loader: Any, name: str) -> int | None:
    """How many batches it has, where it knows. Raises TypeError for what is no iterable of batches, ValueError for one that is
    empty or allows one pass at a time."""
    if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, dict, torch.Tensor)):
        raise TypeError(f"{name} must be a DataLoader or another iterable of batches, got {type(loader).__name__}")
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
