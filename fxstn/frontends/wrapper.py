"""A module around a model: names that it does not have itself are the model's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from fxstn.hp.groups import guard_groups
from fxstn.ir.copies import deep_copy


class ModelWrapper(nn.Module):
    """Base of a module with the child `model`.

    Attributes and methods that only the model has are reached through it, and set on it. Its methods run as plain code, at the
    model's own strengths. What the class body annotates is the network's own, also before it is set.
    """

    def __init__(self) -> None:
        super().__init__()
        guard_groups(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_groups(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy, also where the model keeps values of its last forward; the copy has them without their graphs."""
        result = self.__new__(type(self))
        memo[id(self)] = result
        result.__setstate__(deep_copy(vars(self), memo))
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("_"):
                raise
            descriptor = inspect.getattr_static(type(model), name, None)
            if isinstance(descriptor, (property, functools.cached_property)):
                return descriptor.__get__(model)  # torch hides the error of a property; this raises it
            if not hasattr(model, name):
                raise
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("_modules", {}).get("model")
        own = name.startswith("_") or name in _declared(type(self)) or name in self.__dict__ or name in _children(self)
        if model is not None and not own and (hasattr(type(model), name) or hasattr(model, name)):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in nn.Module, with strict. The state_dict of a plain model is loaded into the model; all else stays as it is.

        Raises ValueError with assign: the graphs and the optimizers hold the parameters that there are.
        """
        if assign:
            raise ValueError(
                "assign=True would put other parameters in place of those that graphs and optimizers hold; leave it out, "
                "which copies the values"
            )
        own, plain = self.state_dict().keys(), self.model.state_dict().keys()
        if sum(key in plain for key in state_dict) > sum(key in own for key in state_dict):
            return self.model.load_state_dict(state_dict, strict)
        return super().load_state_dict(state_dict, strict)


def _children(module: nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}


def _declared(cls: type) -> frozenset[str]:
    """Names of attributes that a class and its bases define or annotate."""
    return frozenset(dir(cls)).union(*(inspect.get_annotations(base) for base in cls.__mro__))
