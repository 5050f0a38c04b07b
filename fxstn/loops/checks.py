"""Checks of a tuner in a loop of somebody else's: its arguments, and where its model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fxstn.bilevel.callbacks import EarlyStopping
from fxstn.bilevel.checks import check_loss, check_settings
from fxstn.hp import Spec
from fxstn.ir.input_errors import in_a_line
from fxstn.ops.precision import inexact

Place = tuple[torch.device, torch.dtype]


def check_arguments(
    hparams: object, functions: Mapping[str, object], epoch_steps: object, callbacks: Sequence[object]
) -> None:
    """Of `fxstn.tune`. Raises TypeError for those of another kind, ValueError for a number out of range.

    functions: {name: function, or None}.
    """
    if isinstance(hparams, Spec):
        raise TypeError(
            f"hparams must be a list, got one {type(hparams).__name__}; give [hp.{type(hparams).__name__}(...)]"
        )
    if hparams is not None and not isinstance(hparams, Sequence):
        raise TypeError(
            f"hparams must be a list of fxstn.hp specs, got {hparams!r}; give [hp.Dropout(), hp.WeightDecay()]"
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}={in_a_line(function)} must be a function, or None")
        if name != "forward" and function is not None:
            check_loss(function, name)
    check_settings({"epoch_steps": epoch_steps})
    if any(isinstance(callback, EarlyStopping) for callback in callbacks):
        raise TypeError(
            "callbacks: EarlyStopping ends a BilevelRunner, and no loop of your own; leave the loop where "
            "len(tuner.history) - tuner.history.best()['epoch'] >= patience"
        )


def place_of(model: nn.Module) -> Place:
    """Device and type of the model's first parameter of floating-point or complex numbers."""
    parameter = next(filter(inexact, model.parameters()))
    return parameter.device, parameter.dtype


def check_place(model: nn.Module, before: Place) -> None:
    """Raises ValueError where a model is no longer where it was when the tuner was made."""
    now = place_of(model)
    if now != before:
        old, new = (f"{device}, {dtype}".replace("torch.", "") for device, dtype in (before, now))
        raise ValueError(
            f"the model was moved from ({old}) to ({new}) since fxstn.tune, and the tuner stays behind: move it before tune, "
            "or detach() and tune again"
        )
