"""What happens around the steps of somebody else's optimizer: before one, once its gradients are there, and after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxstn.bilevel.scaling import overflows


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer itself, where a framework has wrapped it in an object that has it as `optimizer`, or as `opt` (fastai)."""
    while parts := [x for name in ("optimizer", "opt") if isinstance(x := getattr(optimizer, name, None), Optimizer)]:
        optimizer = parts[0]
    return optimizer


def hook_steps(
    optimizer: Optimizer,
    before: Callable[[Optimizer, bool], None],
    after: Callable[[Optimizer], None],
    added: Callable[[Optimizer], Tensor | float],
) -> list[RemovableHandle]:
    """Call functions around each step that changes weights.

    before: function (optimizer, first), called when the gradients of the step are there: before the step, or inside it after
        each call of its closure. first: whether this is the first call in the step.
    after: function (optimizer), called after the step.
    added: function (optimizer) → what `before` adds to the loss by its gradients, for an optimizer that reads a closure's loss.
    """

    def before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        optimizer_, *positional = args
        closure = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            if changes_weights(optimizer):
                before(optimizer, True)
            return None
        first = True

        def closure_with_gradients() -> Any:
            nonlocal first
            loss = closure()
            if changes_weights(optimizer):
                loss = loss if loss is None else loss + added(optimizer)
                before(optimizer, first)
                first = False
            return loss

        if positional:
            return (optimizer_, closure_with_gradients, *positional[1:]), kwargs
        return args, kwargs | {"closure": closure_with_gradients}

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if changes_weights(optimizer):
            after(optimizer)

    eager = torch.compiler.disable  # where the user compiles the step, what happens around it is no part of that graph
    return [optimizer.register_step_pre_hook(eager(before_step)), optimizer.register_step_post_hook(eager(after_step))]


class ZeroGradHook:
    """A context around each `zero_grad` of an optimizer, until `remove`.

    context: makes it.
    """

    def __init__(self, optimizer: Optimizer, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.optimizer, self.own = optimizer, vars(optimizer).get("zero_grad")
        plain: Callable[..., None] = optimizer.zero_grad

        @functools.wraps(plain)
        def zero_grad(*args: object, **kwargs: object) -> None:
            with context():
                plain(*args, **kwargs)

        vars(optimizer)["zero_grad"] = zero_grad

    def remove(self) -> None:
        """Give the optimizer its own method back."""
        attributes = vars(self.optimizer)
        attributes.pop("zero_grad", None)
        if self.own is not None:
            attributes["zero_grad"] = self.own


def changes_weights(optimizer: Optimizer) -> bool:
    """Whether a step changes weights: some weight has a gradient, and no GradScaler has found one that overflowed."""
    with_gradient = any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])
    return with_gradient and not overflows(optimizer)


def sets_up_state(optimizer: Optimizer) -> bool:
    """Whether a step may be one of a fresh optimizer at rate 0, by which torch.distributed.checkpoint sets up its state."""
    return not optimizer.state and all(not group["lr"] for group in optimizer.param_groups)


def gradient_factor(optimizer: Optimizer) -> Tensor | float | None:
    """What the gradients of the loss are multiplied by: the scale of a GradScaler, and −1 for an optimizer that maximizes.

    None where they are those of the loss.
    """
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if optimizer.param_groups[0].get("maximize", False):
        return -1.0 if scale is None else -scale
    return scale
