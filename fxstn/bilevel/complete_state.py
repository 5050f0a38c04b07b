"""The state of a module with every parameter and buffer by its name, whatever its own state_dict leaves out or renames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fxstn.bilevel.state import State


class CompleteState:
    """A module as a part of a run, which goes on from all of its parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> State:
        own = self.module.state_dict()
        return own | left_out(self.module, own)

    def load_state_dict(self, state: State) -> None:
        load_complete(self.module, state)


def left_out(module: nn.Module, state: Mapping[str, object]) -> dict[str, Tensor]:
    """{name: tensor} of what the module's own state_dict does not have under its name, as where a frozen backbone stays out."""
    return {name: tensor.detach() for name, tensor in _tensors(module) if name not in state}


@torch.no_grad()
def load_complete(module: nn.Module, state: State) -> None:
    """Give a module the values of a complete state. One that leaves nothing out loads it itself.

    Raises ValueError, and changes nothing, where the state lacks a tensor that the module has.
    """
    if not left_out(module, module.state_dict()):
        module.load_state_dict(state)
        return
    own = dict(_tensors(module))
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(
                f"the state is of another model: it has no {name!r} of shape {tuple(tensor.shape)}; give one of the same class"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    for path, child in module.named_modules():
        if (extra := f"{path}._extra_state".removeprefix(".")) in state:
            child.set_extra_state(state[extra])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that torch saves, by each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    for path, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{path}.{name}".removeprefix("."), buffer
