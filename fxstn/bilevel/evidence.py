"""What gradients show of a hyperparameter: their averages, the noise of these, and the share of a step that is certain."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def weight_sum(memory: float, count: float) -> float:
    """The weights of `count` ≥ 1 values together, in an average that began at zero. Divided by it, this is their mean."""
    return 1 - memory**count


@dataclass(frozen=True)
class Evidence:
    """What the gradients of a parameter have shown so far.

    mean, square, surprise: the averages of the state, in the parameter's shape: of the gradient, of its square, and of its
        variance, which is what the mean did not foresee, squared. Divided by their `weight_sum`, mean and square are Adam's m
        and v.
    count: ≥ 1, the number of gradients. The first is no surprise.
    """

    mean: Tensor
    square: Tensor
    surprise: Tensor
    count: float


def bound_gradient(gradient: Tensor) -> Tensor:
    """The gradient, at least in float32, with its finite values no larger than what can still be squared there.

    An infinity becomes NaN: x then shows it, as with every optimizer of torch.
    """
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    largest = math.sqrt(torch.finfo(gradient.dtype).max) / 4  # a difference of two gradients is squared, too
    return gradient.clamp(-largest, largest).add_(gradient, alpha=0)  # 0 ∞ is NaN


def update_evidence(gradient: Tensor, state: dict[str, Tensor]) -> Evidence:
    """Add a gradient to the averages in `state`, which is {} at first.

    The noise is what the mean did not foresee, (g − m₋₁)² / (1 + κ₋₁), and not the deviation from the mean: a gradient that
    fades slowly, as it does while λ moves to its place, is not noisy.
    """
    if not state:
        state |= {"step": torch.tensor(0.0)} | {key: torch.zeros_like(gradient) for key in AVERAGES}
    before = state["step"].item()
    mean, square, surprise = (state[key] for key in AVERAGES)
    averages, news = [square], [gradient]
    weights = [1 - SQUARE_MEMORY]
    if before:
        averages += [surprise]
        news += [torch.sub(gradient, mean, alpha=1 / weight_sum(MEAN_MEMORY, before))]
        weights += [(1 - NOISE_MEMORY) / (1 + squared_weights(before))]
    torch._foreach_mul_(averages, [SQUARE_MEMORY, NOISE_MEMORY][: len(averages)])
    torch._foreach_addcmul_(averages, news, news, weights)
    mean.lerp_(gradient, 1 - MEAN_MEMORY)
    state["step"] += 1
    return Evidence(mean, square, surprise, before + 1)


def noise_gate(evidence: Evidence, certainty: float, needed: Tensor) -> Tensor:
    """ρ in [0, 1]: the share of a step that the evidence for its direction allows.

    certainty: ≥ 0, standard deviations.
    needed: the share of the certainty, in [0, 1], that each number needs, in the parameter's shape.

    With z = m/e, where e is the standard error of m, noise alone gives Σ z² over h numbers of about h ± √(2h). With
    q(h) = h + needed certainty √(2h)

        ρ = max(0, 1 − q(1)/z², 1 − q(h)/Σ min(z², 9)),

    the positive-part shrinkage of James & Stein (1961): a number moves when its own gradient is certain, and when the gradients
    of all together are. Nothing is certain before a second gradient.
    """
    mean, known = evidence.mean, evidence.count - 1
    if not known:
        return torch.zeros_like(mean)
    variance = squared_weights(evidence.count) / weight_sum(NOISE_MEMORY, known)  # e² of one unit of surprise
    unit = (
        known / (known + 2) / variance / weight_sum(MEAN_MEMORY, evidence.count) ** 2
    )  # few gradients estimate e² at first
    z2 = mean.square() / evidence.surprise.clamp_min(torch.finfo(mean.dtype).tiny)  # in units: the host does the rest
    own, together = (torch.rsub(needed, h, alpha=-certainty * math.sqrt(2 * h)) for h in (1, mean.numel()))
    doubt = torch.minimum(own / z2, together / z2.clamp(max=MOST_EVIDENCE / unit).sum())
    return torch.rsub(doubt, 1, alpha=1 / unit).relu_()
