"""Gradients in a loop: Θᵀ∇L_T of a step that it is about to take, and those that a bad loss left."""

from __future__ import annotations

from torch import Tensor

from fxstn.bilevel.faults import BadLoss, slow_after, warn_caller
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


def leave_out(tuner: Tuner, fault: BadLoss) -> None:
    """Go on after a loss that is no number: warn, and halve the rates that it calls too high."""
    tuner.updates.drop_gradients()
    rates = ", ".join(
        f"{name} has the learning rate {rate:.3g} now" for name, rate in slow_after(fault, tuner.updates, 0.5)
    )
    text = f"{fault}; the tuner left this step out" + (f", and {rates}" if rates else "")
    tuner.monitors.warnings.append((tuner.epoch, text))
    warn_caller(text)
