"""The optimizers that a run takes where none is given, and the check of those that are given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEMORY, SQUARE_MEMORY, NOISE_MEMORY = 0.9, 0.999, 0.99  # the first two are Adam's
END = 0.1  # part of its range, from either end, over which a step towards that end comes to need all of the certainty
SURE = 9.0  # a squared z beyond which more says no more
_FACTORY = "pass a factory, such as lambda params: torch.optim.SGD(params, lr=0.1)"
OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2; one fused kernel per step where the device has it."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=_fusible(parameters))


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


class SettlingAdam(torch.optim.Optimizer):
    """Adam whose learning rate falls, and that moves numbers only as far as it is certain of the sign of their gradients.

    Step t = 0, 1, …: x ← x − lr/√(1 + t/settle) · ρ m/√v, with Adam's averages m and v of the gradient g and of its square. Of
    m the standard error is e = √(κ d), where κ is the sum of the squared weights of the average (about 1/19) and d the mean of
    (g − m₋₁)²/(1 + κ₋₁): what m did not foresee, so that a gradient that changes slowly is not taken for a noisy one. With
    z = m/e, for noise alone Σ z² over h numbers is about h ± √(2h), and with q(h) = h + certainty √(2h)

        ρ = max(0, 1 − q(1)/z², 1 − q(h)/Σ min(z², 9)),

    shrinkage by the positive part as of James & Stein (1961): a number moves when its own gradient is certain, and when those
    of all together are; the bound lets no single one speak for all. Noise hardly moves x, where Adam, which divides by its
    size, would let it walk at random; a gradient that agrees with itself moves x as Adam does. h: of a parameter tensor.
    So without a gap. The group's "gap" s in [0, 1], or a list of one for each number, limits steps (`fxstn.bilevel.limits`; a
    `BilevelRunner` sets it, with limits=False it does not): steps up are multiplied by s and need only 1 − s of the certainty,
    steps down need s of it, so that noise drives x the way that the gap favours. But not to the ends of its range, in which x
    is taken to be at 1/(1 + e⁻ˣ): over the last tenth the need of a step towards an end grows to all of the certainty. NaN,
    where nothing is known: none of that. With certainty=None only the product remains, and noise lets x drift downwards.
    certainty ≥ 0, in standard deviations; None: Adam with this rate. lr > 0, settle > 0.
    With this rate λ can travel about 2 lr √(settle T) in T steps: across its range within the few hyper steps of a short run,
    while in a long one it settles; the length of the run need not be known. (Rates that fall as 1/√t are those of
    stochastic gradient descent with averaging, Nemirovski et al. 2009, Sec. 2.2.)
    """

    def __init__(
        self, params: Any, lr: float = 0.4, settle: float = 25.0, certainty: float | None = 2.0, limits: bool = True
    ) -> None:
        if not lr > 0 or not settle > 0 or (certainty is not None and not certainty >= 0):
            raise ValueError(f"need lr > 0, settle > 0, certainty >= 0 or None; got {lr}, {settle}, {certainty}")
        defaults = {"lr": lr, "first_lr": lr, "settle": settle, "certainty": certainty}
        super().__init__(params, defaults | {"limits": limits, "gap": math.nan})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._step(x, x.grad, group, self.state[x])

    def _step(self, x: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": torch.tensor(0.0)} | {key: torch.zeros_like(x) for key in ("mean", "square", "surprise")}
        done = state["step"].item()
        group["lr"] = group["first_lr"] / math.sqrt(1 + done / group["settle"])
        state["step"] += 1
        if done:
            before = state["mean"] / (1 - MEMORY**done)
            state["surprise"].lerp_((gradient - before).square() / (1 + _squared_weights(done)), 1 - NOISE_MEMORY)
        mean = state["mean"].lerp_(gradient, 1 - MEMORY) / (1 - MEMORY ** (done + 1))
        square = state["square"].lerp_(gradient.square(), 1 - SQUARE_MEMORY) / (1 - SQUARE_MEMORY ** (done + 1))
        step = group["lr"] * mean / (square.sqrt() + 1e-8)
        gap = x.new_tensor(group["gap"])
        step = torch.where((step < 0) & ~gap.isnan(), gap * step, step)
        if (certainty := group["certainty"]) is not None:
            place = x.sigmoid()
            up, down = ((room / END).clamp(max=1) for room in (1 - place, place))
            wanted = certainty * torch.where(step < 0, 1 - gap * up, 1 - (1 - gap) * down).nan_to_num(1.0)
            step *= _certain(mean, state, wanted)
        x -= step


def _squared_weights(steps: float) -> float:
    """κ: the sum of the squared weights of Adam's average of so many gradients; 1 of one."""
    forgotten = MEMORY**steps
    return (1 - MEMORY) / (1 + MEMORY) * (1 + forgotten) / (1 - forgotten)


def _certain(mean: Tensor, state: dict[str, Any], certainty: Tensor) -> Tensor:
    """ρ. Nothing is certain before a second gradient."""
    steps = state["step"].item()
    known = steps - 1  # surprises so far
    if not known:
        return torch.zeros_like(mean)
    variance = _squared_weights(steps) * state["surprise"] / (1 - NOISE_MEMORY**known)
    z2 = mean.square() / variance.clamp_min(torch.finfo(mean.dtype).tiny)
    z2 *= known / (known + 2)  # for the variance is an estimate, from few at first
    own, together = (h + certainty * math.sqrt(2 * h) for h in (1, mean.numel()))
    return torch.maximum(1 - own / z2, 1 - together / z2.clamp(max=SURE).sum()).clamp_min(0)


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
