"""The optimizers that a run takes where none is given, and the check of those that are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_FACTORY = "pass a factory, such as lambda params: torch.optim.SGD(params, lr=0.1)"
OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2; one fused kernel per step where the device has it."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=_fusible(parameters))


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


def _fusible(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def made(given: OptimizerLike, default: Any, parameters: Sequence[nn.Parameter], name: str) -> Any:
    """An optimizer over exactly `parameters`: the one given, or made by the factory given, or the default.

    Raises TypeError for what is neither, ValueError for one over other parameters, that cannot be made or wants a closure.
    """
    if isinstance(given, torch.optim.Optimizer):
        result = given
    elif given is None or callable(given):
        try:
            result = (given or default)(parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be made: {error}; {_FACTORY}") from error
    else:
        raise TypeError(f"{name}={given!r} must be an optimizer or a factory; {_FACTORY}")
    if not isinstance(result, torch.optim.Optimizer):
        raise TypeError(f"{name} must be an optimizer, its factory returns {type(result).__name__}; {_FACTORY}")
    closure = inspect.signature(result.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{name}: {type(result).__name__} evaluates a closure, which a run has none of; use SGD, Adam or "
                         "another that steps on gradients")  # fmt: skip
    held = {id(parameter) for group in result.param_groups for parameter in group["params"]}
    wanted = {id(parameter) for parameter in parameters}
    if held != wanted:
        raise ValueError(
            f"{name} holds {len(held - wanted)} parameters that are not its own and lacks {len(wanted - held)} of its "
            f"{len(wanted)}; {_FACTORY}"
        )
    return result
