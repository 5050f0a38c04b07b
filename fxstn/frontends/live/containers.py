"""Structures that hold tensors: arguments of an operation, inputs and outputs of a model, a module's attributes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

INTERNAL = set(vars(nn.Module()))  # attributes that every module has


def arguments_mapped(function: Callable[[Tensor], object], value: object) -> Any:
    """Arguments of one operation, or its results, with each tensor replaced: through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is tuple or type(value) is list:
        return type(value)(arguments_mapped(function, entry) for entry in value)
    if type(value) is dict:
        return {key: arguments_mapped(function, entry) for key, entry in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "numel"):  # named results; a torch.Size holds no tensor
        return rebuilt(value, [arguments_mapped(function, entry) for entry in value])
    return value


def rebuilt(original: tuple | list, entries: Iterable[object]) -> Any:
    """Other entries in a sequence of the same type, named tuples included."""
    kind: Callable[..., Any] = type(original)
    return kind(*entries) if hasattr(original, "_fields") else kind(entries)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors among the arguments or results of one operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)


def mapped(function: Callable[[Any], object], structure: object) -> Any:
    """A structure with every leaf replaced, through whatever pytree knows and through dataclasses."""

    def leaf(value: object) -> object:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return function(value)
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(result, field.name, mapped(function, getattr(value, field.name)))
        return result

    return tree_map(leaf, structure)


def leaves(structure: object) -> list[object]:
    """The leaves that `mapped` visits, in its order."""
    result: list[object] = []
    mapped(result.append, structure)
    return result


def reachable(value: object, name: str, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor that a value reaches through containers and attributes; modules are left out."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield name, value
    elif id(value) not in seen and not isinstance(value, (nn.Module, type, str, bytes)):
        seen.add(id(value))
        entries: Iterable[tuple[object, object]] = ()
        if isinstance(value, dict):
            entries = value.items()
        elif isinstance(value, (tuple, list, set, frozenset)):
            entries = enumerate(value)
        elif hasattr(value, "__dict__") and not callable(value):
            entries = vars(value).items()
        for key, entry in list(entries):
            yield from reachable(entry, f"{name}.{key}" if name else str(key), seen)


def attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter, buffer and other tensor that an attribute of the model's modules reaches."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in INTERNAL:
                yield from reachable(value, f"{path}.{key}".lstrip("."))
