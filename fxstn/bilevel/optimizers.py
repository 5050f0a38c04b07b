"""The optimizers that a run takes where none is given, and the check of those that are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2; one fused kernel per step where the device has it."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=_fusible(parameters))


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


class SettlingAdam(torch.optim.Adam):
    """Adam whose learning rate is lr / √(1 + t / settle) at its step t = 0, 1, …

    Over T steps λ can travel about 2 lr √(settle T): across its range within the few hyper steps of a short run, while in a
    long one its noise dies down; the length of the run need not be known. (Rates that fall as 1/√t are those of stochastic
    gradient descent with averaging, Nemirovski et al. 2009, Sec. 2.2.)
    """

    def __init__(self, params: Any, lr: float = 0.2, settle: float = 25.0) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["first_lr"], group["settle"] = lr, settle

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            done = float(self.state[group["params"][0]].get("step", 0))
            group["lr"] = group["first_lr"] / math.sqrt(1 + done / group["settle"])
        return super().step(closure)


def _fusible(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def made(given: OptimizerLike, default: Any, parameters: Sequence[nn.Parameter], name: str) -> Any:
    """An optimizer over exactly `parameters`: the one given, or made by the factory given, or the default.

    Raises TypeError for what is neither, ValueError for one over other parameters.
    """
    if isinstance(given, torch.optim.Optimizer):
        result = given
    elif given is None or callable(given):
        result = (given or default)(parameters)
    else:
        raise TypeError(
            f"{name} must be an optimizer or a factory such as lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    held = {id(parameter) for group in result.param_groups for parameter in group["params"]}
    wanted = {id(parameter) for parameter in parameters}
    if held != wanted:
        raise ValueError(
            f"{name} holds {len(held - wanted)} parameters that are not its own and lacks {len(wanted - held)} of its "
            f"{len(wanted)}; pass a factory, lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    return result
