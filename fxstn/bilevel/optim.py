"""SettlingAdam, the optimizer of hyperparameters, in parts: averages, the falling rate, the noise gate, the gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

# How much of an average stays when a gradient comes in.
MEAN_MEMORY, SQUARE_MEMORY = 0.9, 0.999  # Adam's own, so that a gradient without noise moves x as Adam does
NOISE_MEMORY = 0.99  # a variance needs more gradients than a mean; the noise of a run changes within some hundreds
END = 0.1  # share of a range, at either end; a dropout or an augmentation does hardly anything there
MOST_EVIDENCE = 9.0  # z = 3 is certain enough: a number with a larger z must not speak for all the others


def falling_rate(first: float, settle: float, steps: float) -> float:
    """The learning rate after so many steps: first / √(1 + steps / settle).

    λ then travels at most about 2 first √(settle T) in T steps: across its range in the few hyper steps of a short run, and
    it settles in a long one. The length of the run need not be known. (Nemirovski et al. 2009, Sec. 2.2: the rate of stochastic
    gradient descent with averaging falls as 1/√t.)
    """
    return first / math.sqrt(1 + steps / settle)


def squared_weights(count: float) -> float:
    """κ: the sum of the squared weights of Adam's mean of `count` ≥ 1 gradients. 1 for one gradient, about 1/19 for many.

    The variance of the mean is κ times that of a gradient.
    """
    forgotten = MEAN_MEMORY**count
    return (1 - MEAN_MEMORY) / (1 + MEAN_MEMORY) * (1 + forgotten) / (1 - forgotten)


class Evidence(NamedTuple):
    """What the gradients of a parameter have shown so far; tensors in its shape.

    mean, square: Adam's averages m of the gradient and v of its square, without bias.
    variance: the squared standard error of m.
    surprises: the number of gradients that `variance` is estimated from. 0 at the first gradient, where it is zero.
    """

    mean: Tensor
    square: Tensor
    variance: Tensor
    surprises: float


def update_evidence(gradient: Tensor, state: dict[str, Tensor]) -> Evidence:
    """Add a gradient to the averages in `state`, which is {} at first.

    The noise is what the mean did not foresee, (g − m₋₁)² / (1 + κ₋₁), and not the deviation from the mean: a gradient that
    fades slowly, as it does while λ moves to its place, is not noisy.
    """
    if not state:
        state |= {"step": torch.tensor(0.0)} | {
            key: torch.zeros_like(gradient) for key in ("mean", "square", "surprise")
        }
    before, count = state["step"].item(), state["step"].item() + 1
    if before:
        foreseen = state["mean"] / (1 - MEAN_MEMORY**before)
        surprise = (gradient - foreseen).square() / (1 + squared_weights(before))
        state["surprise"].lerp_(surprise, 1 - NOISE_MEMORY)
    state["step"] += 1
    mean = state["mean"].lerp_(gradient, 1 - MEAN_MEMORY) / (1 - MEAN_MEMORY**count)
    square = state["square"].lerp_(gradient.square(), 1 - SQUARE_MEMORY) / (1 - SQUARE_MEMORY**count)
    variance = squared_weights(count) * state["surprise"]
    return Evidence(mean, square, variance / (1 - NOISE_MEMORY**before) if before else variance, before)


def noise_gate(evidence: Evidence, certainty: Tensor) -> Tensor:
    """ρ in [0, 1]: the share of a step that the evidence for its direction allows.

    certainty: ≥ 0, standard deviations; in the parameter's shape.

    With z = m/e, where e is the standard error of m, noise alone gives Σ z² over h numbers of about h ± √(2h). With
    q(h) = h + certainty √(2h)

        ρ = max(0, 1 − q(1)/z², 1 − q(h)/Σ min(z², 9)),

    the positive-part shrinkage of James & Stein (1961): a number moves when its own gradient is certain, and when the gradients
    of all together are. Nothing is certain before a second gradient.
    """
    mean, known = evidence.mean, evidence.surprises
    if not known:
        return torch.zeros_like(mean)
    z2 = mean.square() / evidence.variance.clamp_min(torch.finfo(mean.dtype).tiny)
    z2 *= known / (known + 2)  # the variance is an estimate, from few gradients at first
    own, together = (h + certainty * math.sqrt(2 * h) for h in (1, mean.numel()))
    return torch.maximum(1 - own / z2, 1 - together / z2.clamp(max=MOST_EVIDENCE).sum()).clamp_min(0)


def needed_certainty(rises: Tensor, gap: Tensor, position: Tensor) -> Tensor:
    """The share of the certainty, in [0, 1], that a step of each number needs.

    rises: whether the step raises the number.
    gap: the generalisation gap's share s, in [0, 1].
    position: where in its range the number is, in [0, 1].

    A step up needs 1 − s and a step down s, so that where the gradient is noise, x goes the way that the gap favours. Over the
    last tenth of the range this grows to 1 for steps towards the end: noise must not drive x to an end, where a regulariser
    does nothing and nothing brings x back.
    """
    up, down = ((room / END).clamp(max=1) for room in (1 - position, position))
    return torch.where(rises, 1 - gap * up, 1 - (1 - gap) * down)


def generalisation_gap(train_loss: float, valid_loss: float) -> float | None:
    """(L_V − L_T) / L_V in [0, 1]: the share of the validation loss that a stronger regularisation can gain at most.

    train_loss, valid_loss: both evaluated without dropout and augmentation.

    A stronger regularisation does not fit the training data better, so at best L_V comes down to L_T. 0 where L_T is above L_V.
    None where the losses say nothing: not finite, negative, or a validation loss of zero.
    """
    if not (0 <= train_loss < math.inf and 0 < valid_loss < math.inf):
        return None
    return min(max(1 - train_loss / valid_loss, 0.0), 1.0)


def set_gap(optimizer: torch.optim.Optimizer, gap: float | None, regularizing: Sequence[bool]) -> None:
    """Limit the next steps of a `SettlingAdam` by the generalisation gap.

    gap: its share of the validation loss, in [0, 1] (`generalisation_gap`). None: no limit.
    regularizing: for each number of the parameter, whether a higher value is a stronger regularisation. Others are not limited.

    An optimizer that knows no gap stays as it is.
    """
    for group in optimizer.param_groups:
        if "gap" in group:
            group["gap"], group["limited"] = gap, list(regularizing)


class SettlingAdam(torch.optim.Optimizer):
    """Adam whose rate falls, whose steps shrink where the gradient is noise, and whose rises the generalisation gap limits.

    params: as of every optimizer of torch.
    lr: > 0, the rate of the first step.
    settle: > 0, steps after which the rate has fallen to lr/√2.
    certainty: ≥ 0, standard deviations; how sure of a gradient's sign a full step is. None: Adam's steps at this rate.
    limits: whether a `BilevelRunner` sets the gap of these parameters.
    position: function of a parameter that returns where in its range each number is, in [0, 1], such as torch.sigmoid for
        logits. None: no number is near an end.

    Step t = 0, 1, … is x ← x − lr/√(1 + t/settle) · ρ m/√v, with Adam's averages m and v and the share ρ in [0, 1] of
    `noise_gate`. Noise hardly moves x, where Adam, which divides by the size of the gradient, walks at random. A gradient that
    agrees with itself moves x as Adam does.

    `set_gap` sets a group's "gap" s in [0, 1], and which numbers are "limited" by it. Their rises are multiplied by s, and
    their steps need the part of the certainty that `needed_certainty` says. Without a gap nothing is limited.

    Raises ValueError for lr, settle or certainty out of range.
    """

    position: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.4,
        settle: float = 25.0,
        certainty: float | None = 2.0,
        limits: bool = True,
        position: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not lr > 0 or not settle > 0 or (certainty is not None and not certainty >= 0):
            raise ValueError(
                f"SettlingAdam: lr={lr} and settle={settle} must be positive, and certainty={certainty} at least 0 or None"
            )
        defaults = {"lr": lr, "first_lr": lr, "settle": settle, "certainty": certainty}
        super().__init__(params, defaults | {"limits": limits, "gap": None, "limited": None})
        self.position = position

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"position": self.position}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the parameters that have a gradient. closure: computes the loss and its gradients anew, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                evidence = update_evidence(x.grad, self.state[x])
                done = self.state[x]["step"].item() - 1
                group["lr"] = falling_rate(group["first_lr"], group["settle"], done)
                decrease = group["lr"] * evidence.mean / (evidence.square.sqrt() + 1e-8)
                x -= self._limited(x, decrease, evidence, group["certainty"], group["gap"], group["limited"])
        return loss

    def _limited(
        self,
        x: Tensor,
        decrease: Tensor,
        evidence: Evidence,
        certainty: float | None,
        gap: float | None,
        limited: list[bool] | None,
    ) -> Tensor:
        """What is left of Adam's step, `decrease`, which is negative where x rises."""
        needed = torch.ones_like(x)
        if gap is not None:
            mask = torch.tensor([True] if limited is None else limited, device=x.device)
            share, rises = x.new_tensor(gap), decrease < 0
            position = torch.full_like(x, 0.5) if self.position is None else self.position(x)
            needed = torch.where(mask, needed_certainty(rises, share, position), needed)
            decrease = torch.where(rises & mask, share * decrease, decrease)
        return decrease if certainty is None else decrease * noise_gate(evidence, certainty * needed)
