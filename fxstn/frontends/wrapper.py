"""A module around a model: names that it does not have itself are the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxstn.hp.groups import guard_groups


class ModelWrapper(nn.Module):
    """Base of a module with the child `model`.

    Attributes and methods that only the model has are reached through it, and set on it. Its methods run as plain code, at the
    model's own strengths.
    """

    def __init__(self) -> None:
        super().__init__()
        guard_groups(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_groups(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("_") or not hasattr(model, name):
                raise
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("_modules", {}).get("model")
        own = name.startswith("_") or hasattr(type(self), name) or name in self.__dict__ or name in _children(self)
        if model is not None and not own and hasattr(model, name):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in nn.Module. The state_dict of a plain model is loaded into the model; all else stays as it is."""
        own, plain = self.state_dict().keys(), self.model.state_dict().keys()
        if sum(key in plain for key in state_dict) > sum(key in own for key in state_dict):
            return self.model.load_state_dict(state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)


def _children(module: nn.Module) -> set[str]:
    return {*module._modules, *module._parameters, *module._buffers}
