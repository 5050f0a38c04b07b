"""Copies of modules that keep values of a forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

T = TypeVar("T")


COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class _Detached(TorchFunctionMode):
    """Inside, copy.deepcopy copies what torch refuses to: a value with a graph, without it, and a compressed sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []  # copy.deepcopy knows objects by their id

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            self.alive.append(args[0].detach())
            args = (self.alive[-1], *args[1:])
        if function is Tensor.__deepcopy__ and args[0].layout in COMPRESSED:
            return args[1].setdefault(id(args[0]), args[0].clone())
        return function(*args, **(kwargs or {}))


def deep_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """copy.deepcopy, also of what keeps values of a forward, such as a module with `self.h = h`: without their graphs.

    Functions that the modules of a copy keep, such as `self.f = lambda x: m(x)`, read the copies of what they close over.
    """
    copies = {} if memo is None else memo
    with _Detached():
        result = copy.deepcopy(value, copies)
    if isinstance(result, nn.Module):
        for module in result.modules():
            for name, attribute in vars(module).items():
                if isinstance(attribute, FunctionType) or (type(attribute) in (list, tuple, dict) and name[0] != "_"):
                    vars(module)[name] = tree_map(lambda leaf: _rebind(leaf, copies), attribute)
    return result


def _rebind(function: object, copies: dict[int, Any]) -> object:
    """A function over the copies of what it closes over; anything else as it is.

    copies: {id of an object: its copy}; functions are added.
    """
    if not isinstance(function, FunctionType) or not function.__closure__:
        return function
    if id(function) not in copies:
        cells = tuple(CellType() for _ in function.__closure__)
        result = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        result.__kwdefaults__, result.__qualname__ = function.__kwdefaults__, function.__qualname__
        result.__dict__.update(function.__dict__)
        copies[id(function)] = result
        for cell, before in zip(cells, function.__closure__, strict=True):
            with suppress(ValueError):  # an empty cell
                content = before.cell_contents
                cell.cell_contents = copies.get(id(content), _rebind(content, copies))
    return copies[id(function)]
