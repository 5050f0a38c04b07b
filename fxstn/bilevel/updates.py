"""The optimizers of a run, and all that happens between a backward pass and their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.bilevel.distributed import average_gradients
from fxstn.bilevel.lending import lent

SchedulerFactories = dict[str, Callable[[torch.optim.Optimizer], Any]] | None
CLIPPED = ("optimizer", "response_optimizer")


def _schedulers(
    given: SchedulerFactories, optimizers: dict[str, torch.optim.Optimizer], argument: str
) -> dict[str, Any]:
    if unknown := sorted(set(given or {}) - set(optimizers)):
        raise ValueError(f"{argument} names {unknown[0]!r}; this run has {', '.join(optimizers)}")
    if wrong := [name for name, make in (given or {}).items() if not callable(make)]:
        raise TypeError(
            f"{argument}[{wrong[0]!r}] must be a factory, such as lambda optimizer: StepLR(optimizer, 30); the optimizer is "
            "made by the runner"
        )
    made = {name: make(optimizers[name]) for name, make in (given or {}).items()}
    if wrong := [name for name, scheduler in made.items() if not hasattr(scheduler, "step")]:
        raise TypeError(
            f"{argument}[{wrong[0]!r}] must return a scheduler, such as StepLR(optimizer, 30); it returns "
            f"{type(made[wrong[0]]).__name__}"
        )
    return made


class Updates:
    """Steps optimizers by name: gradients unscaled, averaged over processes, clipped; schedulers of steps behind them."""

    def __init__(
        self,
        optimizers: dict[str, torch.optim.Optimizer],
        schedulers: SchedulerFactories,
        step_schedulers: SchedulerFactories,
        clip_norm: float | None,
        scaler: torch.amp.GradScaler,
        check: bool = False,
    ) -> None:
        """check: whether losses may be wrong about whose gradients they give (a problem of one's own)."""
        self.optimizers, self.clip_norm, self.scaler = optimizers, clip_norm, scaler
        self.check = check
        self._checked: set[tuple[str, ...]] = set()
        self.schedulers = _schedulers(schedulers, optimizers, "schedulers")
        self.step_schedulers = _schedulers(step_schedulers, optimizers, "step_schedulers")

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _check_gradients(self, names: tuple[str, ...]) -> None:
        """Raises RuntimeError where the first loss before these steps left gradients that another step would take, too."""
        if not self.check or names in self._checked:
            return
        self._checked.add(names)
        for other in self.optimizers.keys() - set(names):
            if any(p.grad is not None for p in self._parameters(other)):
                raise RuntimeError(f"the loss for the step of {' and '.join(names)} also has gradients for the parameters of "
                                   f"{other}, which the next step there adds to its own: detach or hold these")  # fmt: skip

    def ready(self, *names: str) -> None:
        """Gradients as they are meant, the same in all processes."""
        self._check_gradients(names)
        for name in names:
            average_gradients(self._parameters(name))
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizers[name])

    def step(self, *names: str) -> None:
        """Step these optimizers; each one's gradients are freed at once, so that w₀'s and Θ's never take memory together."""
        for name in names:
            if self.clip_norm is not None and name in CLIPPED:
                nn.utils.clip_grad_norm_(self._parameters(name), self.clip_norm)
            self.scaler.step(self.optimizers[name])
            self.optimizers[name].zero_grad()
            if name in self.step_schedulers:
                self.step_schedulers[name].step()
        self.scaler.update()

    def epoch_done(self, valid_loss: float) -> None:
        for scheduler in self.schedulers.values():
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([valid_loss] if plateau else []))

    def slow(self, name: str, factor: float) -> float:
        """Multiply a learning rate, and what its schedulers start from; returns the new one."""
        groups = self.optimizers[name].param_groups
        for group in groups:
            for key in ("lr", "initial_lr", "first_lr"):
                if key in group:
                    group[key] = factor * group[key]
        for scheduler in (self.schedulers.get(name), self.step_schedulers.get(name)):
            if scheduler is not None and hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
        return float(groups[0]["lr"])

    def parts(self) -> dict[str, dict[str, Any]]:
        """Everything with a state, by kind and name."""
        kinds = {"optimizers": self.optimizers, "schedulers": self.schedulers, "step_schedulers": self.step_schedulers}
        return {**kinds, "scaler": {"scaler": self.scaler}}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {kind: {name: part.state_dict() for name, part in parts.items()} for kind, parts in self.parts().items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        for kind, parts in self.parts().items():
            for name, part in parts.items():
                part.load_state_dict(state[kind][name])


class Averaged:
    """Exponential moving averages of those tensors that are floating point: a ← decay a + (1 − decay) x."""

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._live = [t for t in tensors if t.is_floating_point()]
        self.averages = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.averages, [t.detach() for t in self._live], 1 - self.decay)

    def of(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The averages of some of the tensors."""
        wanted = {id(tensor) for tensor in tensors}
        return [average for live, average in zip(self._live, self.averages, strict=True) if id(live) in wanted]

    def in_place(self) -> AbstractContextManager[None]:
        """The tensors have their averages while this lasts."""
        return lent(self._live, self.averages)

    def load(self, averages: list[Tensor]) -> None:
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(saved)
