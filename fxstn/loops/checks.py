"""Checks of a tuner in a loop of somebody else's: the state that it goes on from, and where its model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[torch.device, torch.dtype]


def check_state(state: Mapping[str, Any], version: int, names: list[str], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a state that a tuner cannot go on from.

    version: of the format.
    names: of the tuner's hyperparameters.
    own: the state_dict of its network.
    """
    if state.get("format") != version or "hyperparameters" not in state:
        raise ValueError(
            "this is no state of a tuner, or one of another version of fxstn; tuner.state_dict() gives one"
        )
    if state["hyperparameters"] != names:
        raise ValueError(
            f"the state tunes {', '.join(state['hyperparameters'])}, and this tuner {', '.join(names)}; tune the same "
            "model with the same hparams"
        )
    sizes = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.startswith("model.")}
    others = {name: tuple(tensor.shape) for name, tensor in state["network"].items()}
    if differing := sorted(name for name in sizes.keys() | others.keys() if sizes.get(name) != others.get(name)):
        name = differing[0]
        raise ValueError(
            f"the state is of another model: {name} has the shape {others.get(name)} there and {sizes.get(name)} here; tune "
            "the same model"
        )


def place_of(model: nn.Module) -> Place:
    """Device and type of the model's first parameter."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def check_place(model: nn.Module, before: Place) -> None:
    """Raises ValueError where a model is no longer where it was when the tuner was made."""
    now = place_of(model)
    if now != before:
        old, new = (f"{device}, {dtype}".replace("torch.", "") for device, dtype in (before, now))
        raise ValueError(
            f"the model was moved from ({old}) to ({new}) since fxstn.tune, and the tuner stays behind: move it before tune, "
            "or detach() and tune again"
        )
