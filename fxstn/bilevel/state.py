"""Protocols of objects that a checkpoint saves, and the state of the random generators."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fxstn.ir.generators import GlobalRandomState

State = dict[str, Any]  # of tensors, numbers, strings, None, and lists, tuples and dicts of them
T = TypeVar("T")


class Stateful(Protocol):
    """A part of a run whose state is the same in all processes."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> object: ...


class LocalState(Protocol):
    """A part of a run that has a state of its own in each process."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> object: ...

    def refusal(self, state: State) -> str:
        """Why this part cannot load a state; "" where it can."""
        ...

    def restart(self, state: State) -> None:
        """Begin the epoch anew.

        state: of process 0 of a run on another number of processes, amid that epoch.
        """
        ...


def on_device(value: T, device: torch.device) -> T:
    """The value with its tensors on a device."""
    moved: T = tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
    return moved


def restore_types(optimizer: Optimizer, state: StateDict) -> None:
    """Set the tensors of an optimizer's state as they were saved, where torch casts them to the type of their parameter.

    state: has been loaded. Averages and master weights may be wider than a parameter of half precision.
    """
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    for x, before in zip(parameters, map(state["state"].get, keys), strict=True):
        if before is None:
            continue
        loaded, structure = tree_flatten(optimizer.state[x])
        saved, as_saved = tree_flatten(before)
        if structure == as_saved:  # others are built anew by their optimizer
            right = [_in_type(value, other) for value, other in zip(loaded, saved, strict=True)]
            optimizer.state[x] = tree_unflatten(right, structure)


def _in_type(loaded: object, saved: object) -> object:
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
        return saved.to(loaded.device, copy=True)
    return loaded


def random_state() -> State:
    """States of the global generators, as a checkpoint holds them."""
    return GlobalRandomState.current().state_dict()


def set_random_state(state: State) -> None:
    """Set the global generators as they were when `random_state` gave this."""
    GlobalRandomState.from_state(state).set()
