"""Structures that hold tensors: arguments of an operation, inputs and outputs of a model, a module's attributes."""

from __future__ import annotations

import copyreg
import dataclasses
import gc
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

INTERNAL = set(vars(nn.Module()))  # attributes that every module has
Kinds = type | tuple[type, ...]
_BUILT_IN = (types.SimpleNamespace, defaultdict, OrderedDict, dict, list, tuple)
_CODE = (type, nn.Module, types.ModuleType, types.CodeType)  # these refer to far more than what a value holds


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


def mapped(function: Callable[[Any], object], structure: object, of: Kinds = Tensor) -> Any:
    """A structure with every leaf replaced, and all its containers of the same types as before.

    It goes through whatever pytree knows, and through every other object that reaches an instance of `of` by its entries or
    attributes. Such an object is made anew without a call of its constructor, which may take something else.
    """
    copies: dict[int, tuple[object, object]] = {}

    def change(value: object) -> object:
        return tree_map(leaf, value)

    def leaf(value: object) -> object:
        if isinstance(value, of) or not (id(value) in copies or _opens(value, of)):
            return function(value)
        if id(value) not in copies:
            _make_anew(value, change, copies)
        return copies[id(value)][1]

    return change(structure)


def leaves(structure: object, of: Kinds = Tensor) -> list[Any]:
    """The leaves that `mapped` visits, in its order."""
    result: list[Any] = []

    def collect(leaf: object) -> object:
        result.append(leaf)
        return leaf

    mapped(collect, structure, of)
    return result


def _opens(value: object, of: Kinds) -> bool:
    """Whether `mapped` goes through a value that pytree does not know."""
    return any(True for _ in reachable(value, "", of=of)) and _blank(value) is not None


def _built_in(value: object) -> type:
    """The built-in type that makes a value's memory and holds its entries."""
    return next((kind for kind in _BUILT_IN if isinstance(value, kind)), object)


def _blank(value: object) -> Any:
    """A new object of a value's type, without entries and attributes; None where Python can make none."""
    try:
        return _built_in(value).__new__(type(value))  # type: ignore[call-overload]
    except TypeError:
        return None


def _make_anew(value: object, change: Callable[[object], object], copies: dict[int, tuple[object, object]]) -> None:
    """Enter a copy of an object with changed entries and attributes in `copies`, {id of an original: (it, its copy)}."""
    result = _blank(value)
    if isinstance(value, tuple):
        result = tuple.__new__(type(value), [change(entry) for entry in tuple.__iter__(value)])
    copies[id(value)] = value, result
    if isinstance(value, list):
        list.extend(result, [change(entry) for entry in list.__iter__(value)])
    elif isinstance(value, dict):
        base: type[dict] = OrderedDict if isinstance(value, OrderedDict) else dict
        for key in base.__iter__(value):
            base.__setitem__(result, key, change(dict.__getitem__(value, key)))
        if isinstance(value, defaultdict):
            result.default_factory = value.default_factory
        if getattr(value, "__dict__", None) is value:
            result.__dict__ = result
            return
    own = getattr(result, "__dict__", {})
    for name, entry in _attributes_of(value).items():
        changed = dict.__getitem__(result, name) if _mirrors(value, name, entry) else change(entry)
        if name in getattr(value, "__dict__", {}):
            own[name] = changed
        else:
            object.__setattr__(result, name, changed)


def _attributes_of(value: object) -> dict[str, object]:
    """What an object has in its __dict__ and its __slots__; nothing of what can be called, unless it is a dataclass."""
    if callable(value) and not dataclasses.is_dataclass(value):
        return {}
    slots: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _mirrors(value: object, name: str, attribute: object) -> bool:
    """Whether an attribute of a dict is its entry of the same name, as in the outputs of transformers."""
    return isinstance(value, dict) and dict.get(value, name) is attribute and attribute is not None


def reachable(value: object, name: str, seen: set[int] | None = None, of: Kinds = Tensor) -> Iterator[tuple[str, Any]]:
    """(name, tensor) for every tensor, or instance of `of`, that a value reaches through containers and attributes.

    Modules are left out.
    """
    seen = set() if seen is None else seen
    if isinstance(value, of):
        yield name, value
    elif id(value) not in seen and not isinstance(value, (nn.Module, type, str, bytes)):
        seen.add(id(value))
        entries: list[tuple[object, object]] = []
        if isinstance(value, dict):
            entries += dict.items(value)
        elif isinstance(value, (tuple, list, set, frozenset)):
            entries += enumerate(value)
        entries += ((key, entry) for key, entry in _attributes_of(value).items() if not _mirrors(value, key, entry))
        for key, entry in entries:
            yield from reachable(entry, f"{name}.{key}" if name else str(key), seen, of)


def hidden(leaf: object, of: Kinds = Tensor) -> Iterator[Any]:
    """Tensors, or instances of `of`, that a leaf of `mapped` holds all the same.

    They are in a set, in a closure, or in an object that cannot be made anew.
    """
    seen: set[int] = set()
    waiting = [leaf]
    while waiting:
        value = waiting.pop()
        if isinstance(value, of):
            yield value
        elif id(value) not in seen and not isinstance(value, _CODE):
            seen.add(id(value))
            if isinstance(value, types.FunctionType):
                waiting += value.__closure__ or ()
            else:
                waiting += gc.get_referents(value)


def path_to(leaf: object, structure: object, name: str) -> str:
    """Where a leaf is in a structure, "output.parts.0" say.

    name: of the structure.
    """
    paths = (path for path, value in reachable(structure, name, of=type(leaf)) if value is leaf)
    return next(paths, name)


def attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter, buffer and other tensor that an attribute of the model's modules reaches."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in INTERNAL:
                yield from reachable(value, f"{path}.{key}".lstrip("."))
