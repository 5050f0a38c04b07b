"""What the modules of a model hold, to tell what a forward assigns, and to undo it."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

ModuleState = dict[nn.Module, dict[str, tuple[object, list[tuple[object, object]]]]]


def module_state(model: nn.Module) -> ModuleState:
    """Every attribute, parameter and buffer of every module, with copies of the containers in it, which can change.

    A scripted module keeps its attributes out of Python; only its tensors can change.
    """

    seen = set[int]()

    def contents(value: object) -> list[tuple[object, object]]:
        return [(container, copy.copy(container)) for container in _containers(value, seen)]

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    return {module: {name: (value, contents(value)) for name, value in vars(module).items()} for module in modules}


def _containers(value: object, seen: set[int]) -> Iterator[object]:
    """The lists, dicts and sets that a value reaches, attributes of objects and what hooks hold included."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if type(value) in _CONTAINERS:
            yield value
        if isinstance(value, dict):
            waiting += dict.values(value)
        elif isinstance(value, (list, set, tuple)):
            waiting += value
        elif isinstance(value, types.FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        elif isinstance(value, functools.partial):
            waiting += [value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif type(getattr(value, "__dict__", None)) is dict and not _is_of_torch(value):
            waiting.append(vars(value))


def _is_of_torch(value: object) -> bool:
    """Whether an object is one of torch's own, an operator say, whose caches change while a forward is traced."""
    return type(value).__module__.partition(".")[0] == "torch"


def restore(state: ModuleState) -> list[str]:
    """Undo what a forward assigned; returns the names of the attributes that it changed."""
    changed = []
    for module, before in state.items():
        now = vars(module)
        for name in {*now, *before}:
            value, contents = before.get(name, (_MISSING, []))
            original = contents[0][1] if contents and contents[0][0] is value else value
            if name in _REGISTERED and isinstance(original, dict):
                registered = now[name]
                keys = {*registered, *original}
                changed += [k for k in keys if registered.get(k, _MISSING) is not original.get(k, _MISSING)]
            elif not (same(now.get(name, _MISSING), original) and all(same(*pair) for pair in contents)):
                changed.append(name)
            for container, copied in contents:
                if not same(container, copied):
                    _refill(container, copied)
            if value is _MISSING:
                del now[name]
            else:
                now[name] = value
    return changed


def _refill(container: object, contents: object) -> None:
    """Give a container the contents that a copy of it has."""
    if isinstance(container, list) and isinstance(contents, list):
        container[:] = contents
    elif isinstance(container, (dict, set)) and isinstance(contents, type(container)):
        container.clear()
        container.update(contents)


_MISSING = object()
_EMPTY = types.CellType()
_CONTAINERS = (list, dict, OrderedDict, set)
_OPAQUE = (type, types.ModuleType, nn.Module, torch.Tensor, str, bytes, int, float)
_REGISTERED = {"_parameters", "_buffers", "_modules"}


def same(a: object, b: object) -> bool:
    """The same object, or an equal plain value, or a container of the same; tensors and modules are never compared."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, (int, float, str, set)) and a == b
