"""The updates of a run: its optimizers and schedulers, and how they step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxstn.bilevel.counts import Mean
from fxstn.bilevel.distributed import average_gradients
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.records import SCHEDULES, OptimizerRecord, Scheduler
from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.state import State, Stateful, restore_types
from fxstn.ops.multi_tensor import clip_gradients

SchedulerFactories = dict[str, Callable[[Optimizer], Scheduler]] | None
CLIPPED = ("optimizer", "response.optimizer")
OPTIONAL = "hyper.scale_optimizer"  # of σ: a run may begin or cease to learn it


def _build_schedulers(
    factories: SchedulerFactories, optimizers: dict[str, Optimizer], argument: str
) -> dict[str, Scheduler]:
    if unknown := sorted(set(factories or {}) - set(optimizers)):
        raise ValueError(f"{argument} names {unknown[0]!r}; this run has {', '.join(optimizers)}")
    if wrong := [name for name, factory in (factories or {}).items() if not callable(factory)]:
        raise TypeError(
            f"{argument}[{wrong[0]!r}] must be a factory, such as lambda optimizer: StepLR(optimizer, 30); the runner makes "
            "the optimizer"
        )
    schedulers = {name: factory(optimizers[name]) for name, factory in (factories or {}).items()}
    needed = ("step", "state_dict", "load_state_dict")
    for name, scheduler in schedulers.items():
        if missing := [method for method in needed if not hasattr(scheduler, method)]:
            raise TypeError(f"{argument}[{name!r}] must return a scheduler, such as StepLR(optimizer, 30); it returns "
                            f"{type(scheduler).__name__}, which has no {missing[0]}()")  # fmt: skip
        groups = {id(group) for group in optimizers[name].param_groups}  # of its parts, or of what it wraps, too
        other = getattr(scheduler, "optimizer", optimizers[name])
        if groups.isdisjoint(map(id, getattr(other, "param_groups", optimizers[name].param_groups))):
            raise ValueError(f"{argument}[{name!r}] returns a scheduler of another optimizer ({type(other).__name__}): make it "
                             "of the one that the factory is given")  # fmt: skip
        if argument == "step_schedulers" and isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(f"step_schedulers[{name!r}] is a ReduceLROnPlateau, which needs the validation loss of an epoch; "
                             "give it in schedulers")  # fmt: skip
        state = scheduler.state_dict()
        if (plain := plain_numbers(state)) is not state:  # a resumed run must reckon with the same types
            scheduler.load_state_dict(plain)
    return schedulers


class Updates:
    """Steps optimizers by name: gradients averaged over the processes, unscaled, clipped; then their step schedulers.

    optimizers: {argument of the runner: optimizer}.
    schedulers, step_schedulers, clip_norm: of `BilevelRunner`.
    scalers: {name of a loss: its scale}.
    check: whether a loss may leave gradients for other parameters than its own, which the first step of each kind then checks.
    """

    def __init__(
        self,
        optimizers: dict[str, Optimizer],
        schedulers: SchedulerFactories,
        step_schedulers: SchedulerFactories,
        clip_norm: float | None,
        scalers: Mapping[str, LossScaler],
        check: bool = False,
    ) -> None:
        self.optimizers, self.clip_norm, self.scalers = optimizers, clip_norm, scalers
        self.check = check
        self._checked: set[tuple[str, ...]] = set()
        self.schedulers = _build_schedulers(schedulers, optimizers, "schedulers")
        self.step_schedulers = _build_schedulers(step_schedulers, optimizers, "step_schedulers")
        self.records = {name: self._record(name) for name in optimizers}

    def _record(self, name: str) -> OptimizerRecord:
        schedules = zip(SCHEDULES, (self.schedulers, self.step_schedulers), strict=True)
        return OptimizerRecord(name, self.optimizers[name], {kind: of[name] for kind, of in schedules if name in of})

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those of an optimizer."""
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def gradients(self, names: Sequence[str]) -> list[Tensor]:
        """Those of the parameters of these optimizers."""
        return [p.grad for name in names for p in self.parameters(name) if p.grad is not None]

    @torch.no_grad()
    def multiply_gradients(self, names: Sequence[str], factor: Tensor | float) -> None:
        for gradient in self.gradients(names):
            gradient *= factor

    def _check_gradients(self, names: tuple[str, ...]) -> None:
        """Raises RuntimeError where the first loss before these steps left gradients that another step would take, too."""
        if not self.check or names in self._checked:
            return
        self._checked.add(names)
        for other in self.optimizers.keys() - set(names):
            if any(p.grad is not None for p in self.parameters(other)):
                raise RuntimeError(f"the loss for the step of {' and '.join(names)} also has gradients for the parameters of "
                                   f"{other}, which the next step there adds to its own: detach or freeze these")  # fmt: skip

    def ready(self, names: tuple[str, ...], scaler: LossScaler, loss: Mean) -> bool:
        """Bring the gradients of these optimizers to their true size, the same in all processes.

        scaler, loss: where the gradients come from.

        False where they overflowed: they are dropped, and no step may follow.
        """
        self._check_gradients(names)
        for name in names:
            # before they are unscaled: an overflow in one process is one in all
            average_gradients(self.parameters(name), loss.count)
        optimizers = [self.optimizers[name] for name in names]
        finite = scaler.unscale(optimizers, loss.value)
        if not finite:
            for optimizer in optimizers:
                optimizer.zero_grad()
        return finite

    def step(self, *names: str) -> None:
        """Step these optimizers. Each one's gradients are freed at once: w₀'s and Θ's never take memory together."""
        for name in names:
            if self.clip_norm is not None and name in CLIPPED:
                clip_gradients(self.parameters(name), self.clip_norm)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
            self.records[name].step()

    def drop_gradients(self) -> None:
        """Forget all gradients, such as those that a bad loss left."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def end_epoch(self, valid_loss: float) -> None:
        """Step the schedulers of epochs."""
        for record in self.records.values():
            record.end_epoch(valid_loss)

    def slow(self, name: str, factor: float) -> float:
        """Multiply a learning rate, and the rates that its schedulers start from and go to; returns the new one."""
        return self.records[name].slow(factor)

    def parts(self) -> dict[str, dict[str, Stateful]]:
        """{kind: {name: part}} of everything with a state."""
        return {
            "optimizers": dict(self.optimizers),
            "schedulers": dict(self.schedulers),
            "step_schedulers": dict(self.step_schedulers),
            "records": dict(self.records),
            "scalers": dict(self.scalers),
        }

    def identity(self) -> dict[str, object]:
        """{kind: {name: type and sizes}}: what two runs must have in common for one to load the other's state.

        Without the optimizer of σ, which a run may have or not.
        """
        kinds: dict[str, dict[str, str]] = {
            kind: {name: type(part).__name__ for name, part in self.parts()[kind].items() if name != OPTIONAL}
            for kind in ("optimizers", *SCHEDULES)
        }
        for name in kinds["optimizers"]:
            sizes = ", ".join(str(len(group["params"])) for group in self.optimizers[name].param_groups)
            kinds["optimizers"][name] += f" of {sizes} tensors"
        return dict(kinds)

    def adapt(self, state: State) -> tuple[State, list[str]]:
        """A state of a run with other settings as one of this run; and texts of what this run takes anew.

        Raises ValueError as `OptimizerRecord.adapt`.
        """
        result: State = {**state, **{kind: {} for kind in ("optimizers", *SCHEDULES, "records")}}
        texts: list[str] = []
        for name, record in self.records.items():
            own = {kind: part.state_dict() for kind, part in record.parts().items()}
            saved = {kind: state[kind][name] for kind in own if name in state[kind]}
            new, remarks = record.adapt(saved) if record.is_alike(saved) else (own, ["begins anew"])
            for kind, part_state in new.items():
                result[kind][name] = part_state
            texts += [f"{name}: {', '.join(remarks)}"] if remarks else []
        return result, texts + [f"no {name}" for name in state["records"] if name not in self.records]

    def state_dict(self) -> State:
        kinds = self.parts().items()
        return {kind: {name: part.state_dict() for name, part in parts.items()} for kind, parts in kinds}

    def load_state_dict(self, state: State) -> None:
        for kind, parts in self.parts().items():
            for name, part in parts.items():
                part.load_state_dict(state[kind][name])
        for name, optimizer in self.optimizers.items():
            restore_types(optimizer, state["optimizers"][name])
