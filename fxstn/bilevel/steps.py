"""One step each: of w₀, of Θ, of λ and σ; and the limit of λ's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import BatchPreparer
from fxstn.bilevel.faults import LossGuard
from fxstn.bilevel.optim import SettlingAdam, set_gap
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.updates import Updates
from fxstn.ir.input_errors import explained_errors


class Stepper:
    """Takes them, on batches placed by `place`, which errors name, at the loss of a problem.

    correction: c of `BilevelRunner`. precision: a context for the losses' forward. watch: looks at the hyper step's loss.
    All raise ValueError (TypeError) where the model or its loss cannot take a batch, and where the loss has no gradient;
    RuntimeError where it has one of parameters that another step learns.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        updates: Updates,
        watch: LossGuard,
        place: BatchPreparer,
        correction: float,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.problem, self.updates, self.watch, self.place = problem, updates, watch, place
        self.correction, self.precision = correction, precision
        self.along: list[Tensor] = []  # Θᵀ∇L_T of the inner steps since the last cycle ended

    def inner(self, batches: Sequence[tuple[Any, Any]], tunes: bool) -> Tensor:
        """Of w₀, and of Θ too for a joint problem; returns the loss. tunes: whether a hyper step will follow."""
        names = ("optimizer", "response_optimizer") if self.problem.joint else ("optimizer",)
        loss = self._backward(self.problem.general_loss, batches)
        self.updates.ready(*names)
        if self.correction and tunes:
            gradient = self.problem.training_hypergradient()
            self.along += [gradient] if gradient is not None else []
        self.updates.step(*names)
        return loss

    def response(self, batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """Of Θ; returns the loss."""
        loss = self._backward(self.problem.response_loss, batches)
        self.updates.ready("response_optimizer")
        self.updates.step("response_optimizer")
        return loss

    def hyper(self, batch: tuple[Any, Any]) -> None:
        """Of λ, and of σ where it is tuned. Raises BadLoss too."""
        names = [name for name in ("hyper_optimizer", "scale_optimizer") if name in self.updates.optimizers]
        loss = self._backward(self.problem.hyper_loss, [batch])
        self.watch.check(distributed.mean({"hyper_loss": loss.item()}, self.place.device), self.place.time)
        self.updates.ready(*names)
        if self.along:
            (held,) = self.problem.hyper_parameters()
            assert held.grad is not None
            held.grad -= self.correction * torch.stack(self.along).mean(0)
        self.updates.step(*names)

    def _backward(self, objective: Callable[[Any, Any], Tensor], batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """Leave the gradient of the mean loss over the batches; returns that mean."""
        losses = []
        for batch in batches:
            with self.precision(), explained_errors(batch, self.place.where, self.problem):
                loss = objective(*batch)
            if not loss.requires_grad:
                raise ValueError(f"{self.place.where}: {objective.__name__} has no gradient; what the model puts out must "
                                 "depend on its trainable parameters, without .detach(), no_grad or all of them "
                                 "frozen")  # fmt: skip
            self.updates.backward(loss / len(batches))
            losses.append(loss.detach())
        return torch.stack(losses).mean()


class GapLimit:
    """Limits the steps of λ by the generalisation gap, in a run that measures it.

    optimizer: of λ. None, or an optimizer that takes no limits: nothing is limited.
    problem: says which numbers regularise, and where in their ranges they are.
    measured: whether the run measures the gap.

    `on` is False where nothing is limited. The gap is 0 until it is measured: what has learned nothing does not overfit, and no
    regulariser rises in the first epoch.
    Raises ValueError when the problem does not say of every number of one λ whether it regularises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, problem: BilevelProblem, measured: bool) -> None:
        self.optimizer, self.regularizing = optimizer, tuple(problem.regularizing())
        shapes = [tuple(parameter.shape) for parameter in problem.hyper_parameters()]
        if self.regularizing and shapes != [(len(self.regularizing),)]:
            raise ValueError(
                f"regularizing() of {type(problem).__name__} is about one λ of shape ({len(self.regularizing)},), its "
                f"hyper_parameters() have the shapes {shapes}; give one entry for each number, or none"
            )
        groups = optimizer.param_groups if optimizer is not None else []
        limits = bool(groups) and all(group.get("limits") for group in groups)
        self.on = measured and limits and any(self.regularizing)
        if isinstance(optimizer, SettlingAdam) and optimizer.position is None:
            optimizer.position = problem.positions
        self.set(0.0)

    def set(self, gap: float | None) -> None:
        """gap: the share of `fxstn.optim.generalisation_gap`; None: no limit."""
        if self.optimizer is not None and self.regularizing:
            set_gap(self.optimizer, gap if self.on else None, self.regularizing)

    def state_dict(self) -> dict[str, object]:
        """Nothing: the gap is part of the optimizer's state."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Lift the limit that the optimizer's state brought from a run that measured the gap, where this one does not."""
        if not self.on:
            self.set(None)
