"""One optimizer group for hyperparameters and weights or responses together is refused at its first step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_networks: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_accepted: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def guard_groups(network: nn.Module) -> None:
    """Refuse optimizers that hold λ and σ in one group with other parameters of the network."""
    _register()
    _networks.add(network)
    _accepted.clear()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError; looks at each optimizer once, and again when it has got further groups."""
    if _accepted.get(optimizer) == len(optimizer.param_groups):
        return
    for network in _networks:
        hyperparameters = set(map(id, network.get_submodule("hparams").parameters()))
        others = set(map(id, network.parameters())) - hyperparameters
        for group in optimizer.param_groups:
            members = set(map(id, group["params"]))
            if members & hyperparameters and members & others:
                raise ValueError(
                    "a group of this optimizer holds the hyperparameters of a network and its weights, with objectives of "
                    "their own; network.parameters() is for no optimizer: make one of network.general_parameters(), one of "
                    "network.response_parameters() and one of network.hparams.parameters()"
                )
    _accepted[optimizer] = len(optimizer.param_groups)
