"""The optimizers that a run takes where none is given, and the check of those that are given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEMORY, SQUARE_MEMORY = 0.9, 0.999  # Adam's
_FACTORY = "pass a factory, such as lambda params: torch.optim.SGD(params, lr=0.1)"
OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2; one fused kernel per step where the device has it."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=_fusible(parameters))


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


class SettlingAdam(torch.optim.Optimizer):
    """Adam whose learning rate falls, and that moves a number only as far as it is certain of the sign of its gradient.

    Step t = 0, 1, …: x ← x − lr/√(1 + t/settle) · ρ m/√v, with Adam's averages m and v of the gradient and of its square. m
    has the standard error e = √(κ (v − m²)/(1 − κ)), where κ is the sum of the squared weights of the average (about 1/19), and
    ρ = max(0, 1 − (certainty · e/m)²), shrinkage by the positive part as of James & Stein (1961). Noise alone moves nothing but
    in one step of twenty (certainty 2), where Adam, which divides by its size, would let x walk at random; a gradient that
    agrees with itself moves x as Adam does. certainty 0: Adam with this rate.
    With this rate λ can travel about 2 lr √(settle T) in T steps: across its range within the few hyper steps of a short run,
    while in a long one it settles; the length of the run need not be known. (Rates that fall as 1/√t are those of
    stochastic gradient descent with averaging, Nemirovski et al. 2009, Sec. 2.2.)
    """

    def __init__(self, params: Any, lr: float = 0.2, settle: float = 25.0, certainty: float = 2.0) -> None:
        super().__init__(params, {"lr": lr, "first_lr": lr, "settle": settle, "certainty": certainty})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._step(x, x.grad, group, self.state[x])

    def _step(self, x: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": torch.tensor(0.0), "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
        done = state["step"].item()
        group["lr"] = group["first_lr"] / math.sqrt(1 + done / group["settle"])
        state["step"] += 1
        first, second = MEMORY ** (done + 1), SQUARE_MEMORY ** (done + 1)
        mean = state["mean"].lerp_(gradient, 1 - MEMORY) / (1 - first)
        square = state["square"].lerp_(gradient.square(), 1 - SQUARE_MEMORY) / (1 - second)
        weights = (
            (1 - MEMORY) / (1 + MEMORY) * (1 + first) / (1 - first)
        )  # κ; 1 after the first step, when e is not known
        error = weights * (square - mean.square()).clamp_min(0) / max(1 - weights, torch.finfo(x.dtype).tiny)
        certain = 1 - group["certainty"] ** 2 * error / mean.square().clamp_min(torch.finfo(x.dtype).tiny)
        if done == 0 and group["certainty"]:
            certain = torch.zeros_like(x)
        x -= group["lr"] * certain.clamp(0, 1) * mean / (square.sqrt() + 1e-8)


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
