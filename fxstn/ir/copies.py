"""Copies of modules that keep values of a forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


class _Detached(TorchFunctionMode):
    """Inside, copy.deepcopy copies a value with a graph as a value without one; torch refuses to copy it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []  # copy.deepcopy knows objects by their id

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            self.alive.append(args[0].detach())
            args = (self.alive[-1], *args[1:])
        return function(*args, **(kwargs or {}))


def deep_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """copy.deepcopy, also of what keeps values of a forward, such as a module with `self.h = h`: without their graphs."""
    with _Detached():
        return copy.deepcopy(value, memo)
