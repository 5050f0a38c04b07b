"""Checks of the losses and loaders of a run, and of arguments in each other's places."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence, Sized

import torch
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from fxstn.hp.specs import Spec
from fxstn.ir.input_errors import a_or_an

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Optimizer, "optimizer"),
    (Spec, "hparams"),
    (DataLoader, "loader"),
    (_Loss, "loss_fn"),
)
_OF_PLACES = {"train_loader": "loader", "valid_loader": "loader"}  # other places have the name of their kind


def _kind_of(value: object) -> str | None:
    """The kind of argument that a value can only be, or a list of such values; None: it may be of several."""
    if isinstance(value, (list, tuple)):
        kinds = {_kind_of(each) for each in value[:8]} if value else {None}
        kind = kinds.pop()
        return kind if not kinds and kind in ("optimizer", "hparams") else None
    return next((kind for types, kind in _KINDS if isinstance(value, types)), None)


def check_places(owner: str, arguments: Mapping[str, object], order: Sequence[str]) -> None:
    """Raises TypeError where an argument is what belongs in another place.

    arguments: {name: value} of those to check.
    order: the names of all.
    """
    wrong = [
        f"{name} is {_shown(value)}"
        for name, value in arguments.items()
        if (kind := _kind_of(value)) is not None and kind != _OF_PLACES.get(name, name)
    ]
    if wrong:
        raise TypeError(
            f"{' and '.join(wrong)}: was an argument left out, or were two swapped? The order is {owner}({', '.join(order)})"
        )


def _shown(value: object) -> str:
    many = isinstance(value, (list, tuple))
    return f"a list of {'specs' if _kind_of(value) == 'hparams' else 'optimizers'}" if many else a_or_an(value)


def check_loss(loss_fn: object, name: str) -> None:
    """Raises TypeError for what cannot be called with (output, target), and with `hparams` where it takes them."""
    if isinstance(loss_fn, type):
        raise TypeError(f"{name} is the class {loss_fn.__name__}, not a function; make one: {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(f"{name} must be a function of (output, target), got {type(loss_fn).__name__}")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:  # some builtins have no signature
        return
    try:
        signature.bind(None, None, **({"hparams": None} if "hparams" in signature.parameters else {}))
    except TypeError as error:
        raise TypeError(f"{name} must be a function of (output, target), or (output, target, hparams); its arguments are "
                        f"{signature}: {error}") from error  # fmt: skip


def check_loader(loader: object, name: str) -> int | None:
    """The number of batches of a loader, where it knows.

    name: of the argument.

    Raises TypeError for what is no iterable of batches, or yields them once; ValueError where the loader is empty.
    """
    if not hasattr(loader, "__iter__") or isinstance(loader, (str, bytes, dict, torch.Tensor)):
        raise TypeError(f"{name} must be a DataLoader or another iterable of batches, got {type(loader).__name__}; "
                        "DataLoader(dataset, batch_size=64) makes one of a data set")  # fmt: skip
    if isinstance(loader, Iterator) and (not hasattr(loader, "__dict__") or isinstance(loader, _BaseDataLoaderIter)):
        raise TypeError(f"{name} is an iterator ({type(loader).__name__}), which yields its batches once; give the DataLoader "
                        "that it was made from, or a list of batches")  # fmt: skip
    if not isinstance(loader, Sized):
        return None
    try:
        batches = len(loader)
    except TypeError:  # a DataLoader of an IterableDataset does not know it
        return None
    if batches == 0:
        raise ValueError(f"{name} is empty: it yields no batch (fewer examples than batch_size with drop_last?)")
    return batches


def check_loaders(train_loader: object, valid_loader: object, replays: bool) -> int | None:
    """The number of training batches, where that is known. Raises as `check_loader`, and ValueError where no validation data
    are given.

    replays: whether λ is not tuned, so that there may be none.
    """
    batches = check_loader(train_loader, "train_loader")
    if valid_loader is not None:
        check_loader(valid_loader, "valid_loader")
    elif not replays:
        raise ValueError("valid_loader=None: λ is tuned on validation data; give some, or a schedule= to replay")
    return batches
