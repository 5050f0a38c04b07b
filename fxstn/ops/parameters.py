"""The parameters of a model by name, looked up in every step."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, call, methodcaller
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

_CHILDREN, _PARAMETERS = attrgetter("_modules"), attrgetter("_parameters")
_KEYS, _VALUES = methodcaller("keys"), methodcaller("values")  # those of a scripted module are no dict's


class _Walk:
    """The names of a model's parameters, for as long as it has the modules and names that it has now.

    It holds no module, which might hold the model. What runs in every step has no loop of Python's.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self.modules = [ref(module) for module in modules.values()]
        self.names = [
            path + ("." if path else "") + name
            for path, module in modules.items()
            for name, _ in module._parameters.items()
        ]
        self.structure = self._structure([*modules.values()])

    def _structure(self, modules: list[nn.Module]) -> tuple[list[int], list[str]]:
        children = chain.from_iterable(map(_VALUES, map(_CHILDREN, modules)))
        return list(map(id, children)), list(chain.from_iterable(map(_KEYS, map(_PARAMETERS, modules))))

    def parameters(self) -> dict[str, nn.Parameter] | None:
        """{name: parameter}; None where the modules or names are others now."""
        modules: list[Any] = [*map(call, self.modules)]
        if None in modules or self._structure(modules) != self.structure:
            return None
        own = chain.from_iterable(map(_VALUES, map(_PARAMETERS, modules)))
        return {name: parameter for name, parameter in zip(self.names, own, strict=True) if parameter is not None}


_walks: WeakKeyDictionary[nn.Module, _Walk] = WeakKeyDictionary()


def parameters_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter}, with each name of a shared one. The modules are walked once, and again when they have changed."""
    if torch.compiler.is_compiling():
        return dict(model.named_parameters(remove_duplicate=False))
    walk = _walks.get(model)
    if walk is not None and (parameters := walk.parameters()) is not None:
        return parameters
    _walks[model] = _Walk(model)
    return dict(model.named_parameters(remove_duplicate=False))
