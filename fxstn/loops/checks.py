"""Checks of a tuner in a loop of somebody else's: its arguments, and where its model is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import nn

from fxstn.bilevel.arguments import check_loss, check_places
from fxstn.bilevel.callbacks import EarlyStopping
from fxstn.bilevel.checks import check_settings
from fxstn.bilevel.run_settings import RATE_OF_HYPER, RATE_OF_RESPONSE
from fxstn.bilevel.settings import CheckpointSettings, check_keywords
from fxstn.hp import Spec
from fxstn.ir.input_errors import in_a_line
from fxstn.ops.precision import inexact

ORDER = ("optimizer", "loss_fn", "train_loader", "valid_loader", "hparams")
Place = tuple[torch.device, torch.dtype]
NAMED = (
    "hparams",
    "forward",
    "valid_loss_fn",
    "example_inputs",
    "epoch_steps",
)  # keywords of fxstn.tune, beside settings
_NO_FILES = "tune writes no files: put tuner.state_dict() in your checkpoint"
_OWN_RATE = "your optimizer has it"
_OWN_SCHEDULERS = "your loop has its schedulers, and the tuner follows the rates"
_FILES = [field.name for field in fields(CheckpointSettings)]
ELSEWHERE = {  # what the runner and other libraries take where tune does not
    **dict.fromkeys(("checkpoints", *_FILES, *(f"checkpoints_{name}" for name in _FILES)), _NO_FILES),
    **dict.fromkeys(("epochs", "max_epochs"), "your loop has the epochs"),
    **dict.fromkeys(("lr", "learning_rate"), _OWN_RATE),
    **dict.fromkeys(("schedulers", "step_schedulers", "scheduler"), _OWN_SCHEDULERS),
    "hyper_lr": RATE_OF_HYPER,
    "response_lr": RATE_OF_RESPONSE,
    "batch_size": "the batch size belongs to the DataLoader",
    "valid": "validation data are valid_loader",
    "train": "training data are train_loader",
    "device": "the tuner works where the model is: move the model before tune",
    "unpack": "give forward=, a function (model, batch) → (output, target)",
    "metrics": "your loop measures what it likes, in callbacks=[function of the tuner] say, called after each evaluation",
    "columns": "add to the rows in callbacks=[function of the tuner], called after each evaluation",
    "patience": "leave your loop where len(tuner.history) - tuner.history.best()['epoch'] >= patience",
    "clip_norm": "your loop clips: torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before optimizer.step()",
    "accumulate": "your loop accumulates, and the tuner sees which batches a step is made of",
    "ema": "your loop averages, by torch.optim.swa_utils.AveragedModel say; the tuner evaluates the model itself",
    "initial_state": "a state that is carried from window to window takes a BilevelRunner",
    "schedule": "a schedule is replayed by a BilevelRunner, and tuner.refit(loader) trains anew on that of the tuner",
    "progress": "your loop has the progress bar",
    "seed": "call torch.manual_seed(seed) before tune",
}


def check_names_of_settings(keywords: Iterable[str], names: Sequence[str]) -> None:
    """Raises TypeError, which says what to do instead, for a setting that `fxstn.tune` does not have.

    names: of its settings.
    """
    check_keywords("tune", keywords, [*names, *NAMED], ELSEWHERE)


def check_order(*arguments: object) -> None:
    """Raises TypeError where an argument of `fxstn.tune` is what belongs in another place. arguments: all but the model."""
    check_places("fxstn.tune", dict(zip(ORDER, arguments, strict=True)), ("model", *ORDER))


def check_arguments(hparams: object, functions: Mapping[str, object], epoch_steps: object, callbacks: object) -> None:
    """Of `fxstn.tune`. Raises TypeError for those of another kind, ValueError for a number out of range.

    functions: {name: function, or None}.
    """
    if isinstance(hparams, Spec):
        raise TypeError(
            f"hparams must be a list, got one {type(hparams).__name__}; give [hp.{type(hparams).__name__}(...)]"
        )
    if hparams is not None and (isinstance(hparams, (str, bytes)) or not isinstance(hparams, Sequence)):
        raise TypeError(
            f"hparams must be a list of fxstn.hp specs, got {hparams!r}; give [hp.Dropout(), hp.WeightDecay()]"
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}={in_a_line(function)} must be a function, or None")
        if name != "forward" and function is not None:
            check_loss(function, name)
    check_settings({"epoch_steps": epoch_steps})
    all_callbacks = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    if any(isinstance(callback, EarlyStopping) for callback in all_callbacks):
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
