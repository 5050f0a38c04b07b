"""Θᵀ∇L_T of a step that a loop is about to take."""

from __future__ import annotations

from torch import Tensor

from fxstn.bilevel.tuner import Tuner
from fxstn.loops.decay import TunedDecay


def note_gradient(tuner: Tuner, decay: TunedDecay, scale: Tensor | float | None) -> None:
    """Note Θᵀ∇L_T, with the penalties that λ has: the gradients that the optimizer will not see, and those it sees.

    scale: that of the gradients in a loop that scales its loss. None: they have their true size.
    """
    if not tuner.notes:
        return
    gradients = [(weight, weight.grad, gradient) for weight, gradient in decay.gradients()]
    for weight, before, gradient in gradients:
        assert before is not None
        weight.grad = before + (gradient if scale is None else gradient * scale)
    noted = tuner.stepper.training_hypergradients
    count = len(noted)
    tuner.before_step()
    if scale is not None:
        noted[count:] = [gradient / scale for gradient in noted[count:]]
    for weight, before, _ in gradients:
        weight.grad = before
