"""Plain values: what torch.load(weights_only=True) reads, so that every file of a run can be loaded again."""

from __future__ import annotations

import io
import numbers
import pickle
import sys
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from fxstn.bilevel.state import State
from fxstn.bilevel.workers import is_worker_fault

_EXACT = frozenset((bool, int, float, complex, str, type(None)))
_REMEDY = "give a number, a text, a tensor, or a list, tuple or dict of these"


def is_plain(value: object) -> bool:
    """Whether a value is a number or a text of Python's own, or a list, tuple or dict of such, however deep."""
    if type(value) is dict:
        return _EXACT.issuperset(map(type, value)) and _are_plain(value.values())
    if type(value) is list or type(value) is tuple:
        return _are_plain(value)
    return type(value) in _EXACT


def _are_plain(values: Collection[object]) -> bool:
    return _EXACT.issuperset(map(type, values)) or all(map(is_plain, values))  # the first is many times as fast


def _plain_number(value: object) -> object:
    """A number or a text in Python's own type; any other value as it is."""
    if type(value) in _EXACT:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, numbers.Complex):
        return complex(value)
    numpy = sys.modules.get("numpy")
    return bool(value) if numpy is not None and isinstance(value, numpy.bool_) else value


def plain_numbers(value: Any) -> Any:
    """A structure in which numbers of NumPy, fractions and enumerations are numbers of Python, keys of dicts too.

    The same object where there is nothing to change.
    """
    if is_plain(value):
        return value
    if type(value) in (dict, OrderedDict, Counter):
        pairs = [(_plain_number(key), plain_numbers(entry)) for key, entry in value.items()]
        if all(new is key and entry is value[key] for (new, entry), key in zip(pairs, value, strict=True)):
            return value
        result = type(value)(dict(pairs))
        if type(value) is OrderedDict:
            vars(result).update(vars(value))  # a state_dict has _metadata
        return result
    if type(value) in (list, tuple, set):
        entries = [plain_numbers(entry) for entry in value]
        unchanged = all(new is old for new, old in zip(entries, value, strict=True))
        return value if unchanged else type(value)(entries)
    return _plain_number(value)


def _is_readable(value: object) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if is_worker_fault(error):
            raise
        return False
    return True


def _emptied(value: object) -> object:
    """What stands for a leaf of a state in a trial: None for what is read for sure, tensors of torch and plain structures."""
    if type(value) in (Tensor, Parameter, dict, list, tuple):
        return None
    return value.new_empty(0) if isinstance(value, Tensor) else value


def _unreadable_entries(value: object, path: str) -> Iterator[tuple[str, object]]:
    """(path, value) of the innermost entries that cannot be read back."""
    if _is_readable(value):
        return
    before = False
    if type(value) in (dict, OrderedDict, Counter, list, tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
        for key, entry in pairs:
            for inner in _unreadable_entries(entry, f"{path}.{key}" if path else str(key)):
                before = True
                yield inner
    if not before:
        yield path, value


def check_readable(state: State) -> None:
    """Raises TypeError that names an entry which could be written to a file and not be read from it.

    Only what may be refused is tried: a history of many epochs takes no longer than one of a few.
    """
    doubtful = tree_map(_emptied, state, is_leaf=is_plain)
    for path, value in _unreadable_entries(doubtful, ""):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{path} is {value!r:.60} of type {kind}, which a checkpoint cannot hold: it would be written and "
                        f"could not be read; {_REMEDY}")  # fmt: skip
