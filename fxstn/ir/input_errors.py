"""Batches that a model or a loss cannot take: torch's error, said as which batch, what it holds and what to do."""

from __future__ import annotations

import dis
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_KINDS = (RuntimeError, IndexError, ValueError, TypeError)
_RAISE = dis.opmap["RAISE_VARARGS"]
_MOST = 200  # characters of an error that are quoted


def raised_in(error: BaseException) -> str:
    """The module whose `raise` statement raised an error; "" for one that Python itself raised, or a function without one."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_code[trace.tb_lasti] != _RAISE:
        return ""
    return str(trace.tb_frame.f_globals.get("__name__", "?"))


def _raiser(error: BaseException) -> str:
    """The package that raised an error; "" for one that an operation raised: torch's, or Python's own."""
    package = raised_in(error).partition(".")[0]
    return "" if package == "torch" else package


def _ours_to_explain(error: BaseException) -> bool:
    """Whether it says that values do not fit an operation: not what a user's own code raises, and no fault of the device."""
    return not isinstance(error, (NotImplementedError, torch.OutOfMemoryError, torch.AcceleratorError)) and not _raiser(
        error
    )


def first_line(error: BaseException) -> str:
    """What an error says, without a backtrace and the like."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".")
    return line if len(line) <= _MOST else line[: _MOST - 1] + "…"


def in_a_line(value: object) -> str:
    """A value as errors show it: by its repr, or by its type where that has several lines."""
    return a_or_an(value) if "\n" in (text := repr(value)) else text


def a_or_an(value: object) -> str:
    """The type of a value with its article: "an AdamW"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, of Python or NumPy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_path(path: object, name: str) -> Path:
    """A path of an argument, with the home folder in place of `~`.

    name: of the argument, for errors.

    Raises TypeError for anything else than text or a path, ValueError for a text that can be none.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name}: {in_a_line(path)} must be a path; give text or a pathlib.Path")
    if not os.fspath(path):
        raise ValueError(f"{name}: {path!r} is no path; give one")
    if "\0" in os.fspath(path):
        raise ValueError(f"{name}: {path!r} has a null character, which no path may have; leave it out")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name}: {str(path)!r} begins with a home folder that is not known here; write it out"
        ) from error


def as_file(path: object, name: str) -> Path:
    """As `as_path`, of a file to be written. Raises ValueError for a folder, too."""
    result = as_path(path, name)
    if result.is_dir():
        raise ValueError(f"{name}: {str(path)!r} is a folder; name a file in it")
    return result


def described(value: object) -> str:
    """Types and shapes of the tensors in a value, with the range of whole numbers: 'float32 (8, 6), int64 (8,) 0 to 2'."""
    leaves = tree_leaves(value)
    shown = [_one(leaf) for leaf in leaves[:4]] + (["…"] if len(leaves) > 4 else [])
    return ", ".join(shown) or "nothing"


def _one(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    text = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    ends = _ends(leaf)
    return f"{text} {ends[0]} to {ends[1]}" if ends else text


def _ends(leaf: Tensor) -> tuple[int, int] | None:
    """Least and greatest of whole numbers; not from another device, where an error may have left nothing to read."""
    known = leaf.numel() and leaf.device.type == "cpu" and leaf.dtype is not torch.bool
    return (int(leaf.min()), int(leaf.max())) if known and _is_whole(leaf) else None


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


@contextmanager
def explained_loss_errors(output: object, target: object) -> Iterator[None]:
    """Around a call of a loss function. Raises ValueError in place of an operation's error."""
    try:
        yield
    except _KINDS as error:
        if not _ours_to_explain(error) and not _is_swapped(error, output, target):
            raise
        raise ValueError(
            f"loss_fn cannot take an output {described(output)} with a target {described(target)}: {first_line(error)}; "
            + _loss_remedy(error, output, target)
        ) from error


_NO_DERIVATIVE = "not have been used in the graph", "does not require grad"
_OF_DERIVATIVES = (
    "a loss gets the output of a forward that is over: take derivatives with respect to inputs in the model's forward, which "
    "returns them beside its output"
)


def _is_swapped(error: BaseException, output: object, target: object) -> bool:
    """Whether an operation that takes outputs got whole numbers, which the target has and the output has not."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or _is_whole(output) or not _is_whole(target):
        return False
    return isinstance(error, NotImplementedError) and "not implemented for" in str(error) and not _raiser(error)


def _loss_remedy(error: BaseException, output: object, target: object) -> str:
    said = str(error)
    if any(words in said for words in _NO_DERIVATIVE):
        return _OF_DERIVATIVES
    if _is_swapped(error, output, target):
        return "loss_fn is called as loss_fn(output, target): give the loss function that it calls the output first"
    usual = "give targets of the shape and type that it takes for such an output"
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return usual
    if "Long" in said and 1 < output.dim() == target.dim() + 1:
        whole = "whole numbers" if target.is_floating_point() else "of type int64"
        return f"class labels must be {whole}: target.long()"
    if "out of bounds" in said and output.dim() > 1 and (ends := _ends(target)):
        classes = output.shape[1]
        return f"labels of {classes} classes must be 0 to {classes - 1}: mend them, or give the model {ends[1] + 1} outputs"
    if output.shape == target.shape:
        by_type = "targets of the output's shape, such as probabilities, must be floating point: target.float()"
        return by_type if _is_whole(target) else usual
    if not _is_whole(target):
        return "give targets of the shape of the output, or a model with as many outputs as the target"
    return usual


@contextmanager
def explained_errors(batch: tuple[Any, Any], where: str, model: nn.Module) -> Iterator[None]:
    """Context manager around an objective: errors of operations become errors about the batch.

    where: which batch it is.

    Raises ValueError (TypeError) in place of an operation's error. An error of fxstn gets the name of the batch, too.
    """
    try:
        yield
    except _KINDS as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        if _raiser(error) == __name__.partition(".")[0] and type(error) is kind:
            raise kind(f"{where}: {error}") from error
        if not _ours_to_explain(error):
            raise
        raise kind(f"{where}: {explanation(error, batch[0], model)}") from error


def explanation(error: BaseException, inputs: object, model: nn.Module) -> str:
    """Why a model cannot take its inputs, and what to do."""
    types = list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point())) or [
        torch.get_default_dtype()
    ]
    said = f"the model cannot take inputs {described(inputs)}: {first_line(error)}"
    kinds = {type(module) for module in model.modules()}
    of_detection = any(kind.__module__.startswith("torchvision.models.detection") for kind in kinds)
    if of_detection and not any(hasattr(kind, "unpack_batch") for kind in kinds):
        return (
            f"{said}; a detector of torchvision takes a list of images and a list of targets: give transform, or tune, "
            "fxstn.DetectionLosses(detector)"
        )
    others = {leaf.dtype for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)} - set(types)
    if len(types) > 1 and not others and "type" in str(error):
        return (
            f"{said}; its parameters are {' and '.join(map(str, types))}: if it trains under torch.autocast, call transform, "
            "or tune, under it as well (a runner: execution=fxstn.ExecutionSettings(autocast=...)); else convert between layers"
        )
    if others and "type" in str(error):
        widest = max(types, key=lambda dtype: dtype.itemsize)
        return f"{said}; its parameters are {widest}: convert the inputs with .to({widest})"
    if "more than 1 value per channel" in str(error):
        return f"{said}; a norm of batches needs 2 examples: give the DataLoader drop_last=True"
    if "primitive descriptor" in str(error):
        return (
            f"{said}; this CPU has no such kernel in the type of autocast: train in another, torch.bfloat16 or float32"
        )
    return f"{said}; give inputs of the number, shapes and range that its forward takes"
