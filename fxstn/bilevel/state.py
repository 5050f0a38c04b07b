"""Protocols of objects that a checkpoint saves, and the state of the random generators."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

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


@dataclass(frozen=True)
class GlobalRandomState:
    """States of the global generators of Python, torch, CUDA and NumPy, those of the last two where they are in use."""

    python: tuple[Any, ...]
    torch: Tensor
    cuda: list[Tensor]
    numpy: Any

    @classmethod
    def current(cls) -> GlobalRandomState:
        numpy = sys.modules.get("numpy")
        return cls(
            random.getstate(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            None if numpy is None else numpy.random.get_state(),
        )

    @classmethod
    def seeded(cls, seed: int) -> GlobalRandomState:
        """The states of generators with this seed; seed in [0, 2³²)."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        numpy = sys.modules.get("numpy")
        return cls(
            random.Random(seed).getstate(),
            torch.Generator().manual_seed(seed).get_state(),
            [torch.Generator(f"cuda:{device}").manual_seed(seed).get_state() for device in devices],
            None if numpy is None else numpy.random.RandomState(seed).get_state(),
        )

    def set(self) -> None:
        """Set the global generators. A run may go on with fewer GPUs than it began on."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        devices = torch.cuda.device_count() if self.cuda and torch.cuda.is_available() else 0
        for device, state in enumerate(self.cuda[:devices]):
            torch.cuda.set_rng_state(state, device)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)

    def state_dict(self) -> State:
        version, internal, gauss = self.python
        state: State = {"python": (version, torch.tensor(internal), gauss), "torch": self.torch, "cuda": self.cuda}
        if self.numpy is None:
            return state | {"numpy": None}
        kind, keys, *rest = self.numpy
        return state | {"numpy": (kind, torch.tensor(keys.astype("int64")), *rest)}

    @classmethod
    def from_state(cls, state: State) -> GlobalRandomState:
        version, internal, gauss = state["python"]
        numpy = state["numpy"]
        if numpy is not None:
            numpy = (numpy[0], numpy[1].cpu().numpy().astype("uint32"), *numpy[2:])
        return cls(
            (version, tuple(internal.cpu().tolist()), gauss),
            state["torch"].cpu(),
            [generator.cpu() for generator in state["cuda"]],
            numpy,
        )


def random_state() -> State:
    """States of the global generators, as a checkpoint holds them."""
    return GlobalRandomState.current().state_dict()


def set_random_state(state: State) -> None:
    """Set the global generators as they were when `random_state` gave this."""
    GlobalRandomState.from_state(state).set()
