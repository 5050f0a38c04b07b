"""What gradients show of a hyperparameter: their averages, the noise of these, and the share of a step that is certain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# How much of an average stays when a gradient comes in.
MEAN_MEMORY, SQUARE_MEMORY = 0.9, 0.999  # Adam's own, so that a gradient without noise moves x as Adam does
NOISE_MEMORY = 0.99  # a variance needs more gradients than a mean; the noise of a run changes within some hundreds
AVERAGES = ("mean", "square", "surprise")  # tensors in a parameter's state, in its shape
MOST_EVIDENCE = 9.0  # z = 3 is certain enough: a number with a larger z must not speak for all the others


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


def bound_gradient(gradient: Tensor) -> Tensor:
    """The gradient, at least in float32, with its finite values no larger than what can still be squared there.

    An infinity stays one: x then shows it, as with every optimizer of torch.
    """
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    largest = math.sqrt(torch.finfo(gradient.dtype).max) / 4  # a difference of two gradients is squared, too
    return torch.where(gradient.isinf(), gradient, gradient.clamp(-largest, largest))


def update_evidence(gradient: Tensor, state: dict[str, Tensor]) -> Evidence:
    """Add a gradient to the averages in `state`, which is {} at first.

    The noise is what the mean did not foresee, (g − m₋₁)² / (1 + κ₋₁), and not the deviation from the mean: a gradient that
    fades slowly, as it does while λ moves to its place, is not noisy.
    """
    if not state:
        state |= {"step": torch.tensor(0.0)} | {key: torch.zeros_like(gradient) for key in AVERAGES}
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


def noise_gate(evidence: Evidence, certainty: Tensor | float) -> Tensor:
    """ρ in [0, 1]: the share of a step that the evidence for its direction allows.

    certainty: ≥ 0, standard deviations; of all numbers, or in the parameter's shape.

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
