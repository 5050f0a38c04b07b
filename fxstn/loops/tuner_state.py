"""The state of a tuner in a loop of somebody else's: written, and taken as a whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fxstn.bilevel.state import State, Stateful, on_device
from fxstn.bilevel.tuner import Tuner
from fxstn.network import SelfTuningNetwork

FORMAT = 9


def parts_of(tuner: Tuner, precision: Stateful) -> dict[str, Stateful]:
    """What of the method itself has a state. precision: the scales of losses follow it."""
    return {
        "precision": precision,
        "updates": tuner.updates,
        "counters": tuner.counters,
        "losses": tuner.guard,
        "means": tuner.means,
        "stepper": tuner.stepper,
        "history": tuner.history,
        "monitors": tuner.monitors,
        "limit": tuner.limit,
        "backtracking": tuner.backtracking,
    }


def state_of(stn: SelfTuningNetwork, names: list[str], parts: Mapping[str, Stateful]) -> State:
    """Θ, λ and σ, and the states of the parts; nothing of the model.

    names: of the hyperparameters.
    """
    network = {name: tensor.detach().clone() for name, tensor in stn.state_dict().items() if not _of_model(name)}
    states = {name: part.state_dict() for name, part in parts.items()}
    return {"format": FORMAT, "hyperparameters": names, "network": network, **states}


def load_state(
    state: Mapping[str, Any],
    stn: SelfTuningNetwork,
    names: list[str],
    parts: Mapping[str, Stateful],
    device: torch.device,
) -> None:
    """Go on from a state. Raises ValueError, and changes nothing, where it is of another tuner."""
    _check(state, ("network", *parts), names, stn.state_dict())
    _check_optimizers(state["updates"], parts["updates"].state_dict())
    before = copy.deepcopy(state_of(stn, names, parts))
    try:
        _take(state, stn, parts, device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        _take(before, stn, parts, device)
        raise ValueError(
            f"the state is of a tuner with other settings: {type(error).__name__}: {error}; tune with those that it had"
        ) from error


def _check_optimizers(saved: State, own: State) -> None:
    """Raises ValueError where a saved optimizer is of another type than that of this tuner."""
    for name, record in own["records"].items():
        try:
            before = saved["records"][name]["initial"]["type"]
        except (LookupError, TypeError):
            before = "no optimizer"
        if before != record["initial"]["type"]:
            raise ValueError(
                f"the state is of a tuner with {before} as {name}, and this one has {record['initial']['type']}; tune with "
                "the settings that it had"
            )


@torch.no_grad()
def _take(
    state: Mapping[str, Any], stn: SelfTuningNetwork, parts: Mapping[str, Stateful], device: torch.device
) -> None:
    own = stn.state_dict()
    for name, tensor in state["network"].items():
        own[name].copy_(tensor)
    for name, part in parts.items():
        part.load_state_dict(on_device(state[name], device))


def _of_model(name: str) -> bool:
    return name.startswith("model.")


def _check(state: Mapping[str, Any], parts: Collection[str], names: list[str], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a state that a tuner cannot go on from.

    parts: what a state has, by name.
    names: of the tuner's hyperparameters.
    own: the state_dict of its network.
    """
    if (
        not isinstance(state, Mapping)
        or state.get("format") != FORMAT
        or not {"hyperparameters", *parts} <= state.keys()
    ):
        raise ValueError(
            "this is no state of a tuner, or one of another version of fxstn; tuner.state_dict() gives one"
        )
    if state["hyperparameters"] != names:
        raise ValueError(
            f"the state tunes {', '.join(state['hyperparameters'])}, and this tuner {', '.join(names)}; tune the same "
            "model with the same hparams"
        )
    sizes = {name: tuple(tensor.shape) for name, tensor in own.items() if not _of_model(name)}
    others = {name: tuple(tensor.shape) for name, tensor in state["network"].items()}
    if differing := sorted(name for name in sizes.keys() | others.keys() if sizes.get(name) != others.get(name)):
        name = differing[0]
        raise ValueError(
            f"the state is of another model: {name} has the shape {others.get(name)} there and {sizes.get(name)} here; tune "
            "the same model"
        )
