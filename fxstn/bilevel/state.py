"""Protocols of objects that a checkpoint saves, and the state of the random generators."""

from __future__ import annotations

import random
import sys
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


def random_state() -> State:
    """States of the global generators of Python, torch and, where it is in use, NumPy."""
    version, internal, gauss = random.getstate()
    state: State = {"python": (version, torch.tensor(internal), gauss), "torch": torch.get_rng_state(), "numpy": None}
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, torch.tensor(keys.astype("int64")), *rest)
    return state


def set_random_state(state: State) -> None:
    """Set the global generators. A run may go on with fewer GPUs than it began on."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.cpu().tolist()), gauss))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, generator in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(generator.cpu(), device)
    if state["numpy"] is not None:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.cpu().numpy().astype("uint32"), *rest))
