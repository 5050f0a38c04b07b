"""The updates of a run: its optimizers, their defaults and checks, the schedulers, and how they step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxstn.bilevel.combined import CombinedOptimizer
from fxstn.bilevel.counts import Mean
from fxstn.bilevel.distributed import average_gradients
from fxstn.bilevel.optim import SettlingAdam
from fxstn.bilevel.plain import plain_numbers
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.records import SCHEDULES, OptimizerRecord, Scheduler
from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.state import State, Stateful

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]
OptimizerLike = Optimizer | Sequence[Optimizer] | OptimizerFactory | None
SchedulerFactories = dict[str, Callable[[Optimizer], Scheduler]] | None
CLIPPED = ("optimizer", "response.optimizer")
OPTIONAL = "hyper.scale_optimizer"  # of σ: a run may begin or cease to learn it
_FACTORY = "pass a factory, such as lambda params: torch.optim.SGD(params, lr=0.1)"


def _fusible(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def sgd(parameters: Sequence[nn.Parameter], fused: bool = True) -> Optimizer:
    """SGD with momentum 0.9, learning rate 1e-2.

    fused: whether a step is one kernel where the device has it, which takes no sparse gradients.
    """
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=fused and _fusible(parameters))


def adam(parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Adam, learning rate 1e-2: for scales U, which are of the order of 1 whatever the layer."""
    return torch.optim.Adam(parameters, lr=1e-2, fused=_fusible(parameters))


rmsprop = partial(torch.optim.RMSprop, lr=1e-2)


def build_optimizer(
    optimizer: OptimizerLike, default: OptimizerFactory, parameters: list[nn.Parameter], name: str
) -> Optimizer:
    """An optimizer over exactly these parameters.

    optimizer: the optimizer itself, several over different parameters, a factory for these, or None, for the default.
    default: a factory.
    name: what errors call it.

    Raises TypeError for anything else. Raises ValueError for an optimizer that cannot be made, has other parameters, or needs a
    closure.
    """
    result: object
    if isinstance(optimizer, (Optimizer, list, tuple)):
        result = optimizer
    elif optimizer is None or callable(optimizer):
        try:
            result = (optimizer or default)(parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be made: {error}; {_FACTORY}") from error
    else:
        raise TypeError(f"{name}={optimizer!r} must be an optimizer or a factory; {_FACTORY}")
    parts = list(result) if isinstance(result, (list, tuple)) else [result]
    optimizers = [part for part in parts if isinstance(part, Optimizer)]
    if len(optimizers) < len(parts) or not parts:
        raise TypeError(f"{name} must be an optimizer, or a list of them, its factory returns {type(result).__name__}; "
                        f"{_FACTORY}")  # fmt: skip
    for part in optimizers:
        closure = inspect.signature(part.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: {type(part).__name__} evaluates a closure, which a run has none of; use SGD, Adam or "
                             "another that steps on gradients")  # fmt: skip
    return _over_exactly(parameters, optimizers[0] if len(parts) == 1 else _combined(optimizers, name), name)


def _combined(parts: Sequence[Optimizer], name: str) -> Optimizer:
    try:
        return CombinedOptimizer(parts)
    except ValueError as error:
        raise ValueError(
            f"{name}: the optimizers of the list have a parameter in common; give each parameter to one"
        ) from error


def _over_exactly(parameters: Sequence[nn.Parameter], result: Optimizer, name: str) -> Optimizer:
    """The optimizer, its settings in plain numbers. Raises ValueError where it has other parameters."""
    for group in result.param_groups:
        group |= {key: plain_numbers(value) for key, value in group.items() if key != "params"}
    theirs = {id(parameter) for group in result.param_groups for parameter in group["params"]}
    ours = {id(parameter) for parameter in parameters}
    if name == "optimizer" and ours and not theirs & ours:
        raise ValueError(
            f"{name} is not over the {len(ours)} parameters of the network: fxstn.transform copies the model, so {_FACTORY}"
        )
    if theirs != ours:
        raise ValueError(
            f"{name} holds {len(theirs - ours)} parameters that are not its own and lacks {len(ours - theirs)} of its "
            f"{len(ours)}; {_FACTORY}"
        )
    return result


def build_optimizers(
    problem: BilevelProblem, choices: dict[str, OptimizerLike], structured: bool
) -> dict[str, Optimizer]:
    """{argument of the runner: optimizer} for every kind of parameters that a problem has.

    choices: {argument: as `build_optimizer` takes it}; others are left out.
    structured: whether the response is a structured one, whose optimizer is by default that of the weights.
    """
    tables = (module for module in problem.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
    sparse = any(table.sparse for table in tables)
    kinds: dict[str, tuple[OptimizerFactory, Iterable[nn.Parameter]]] = {
        "optimizer": (partial(sgd, fused=not sparse), problem.general_parameters()),
        "response.optimizer": (sgd if structured else adam, problem.response_parameters()),
        "hyper.optimizer": (SettlingAdam, problem.hyper_parameters()),
        "hyper.scale_optimizer": (rmsprop, problem.scale_parameters()),
    }
    return {
        name: build_optimizer(choices[name], default, parameters, name)
        for name, (default, generator) in kinds.items() if name in choices and (parameters := list(generator))
    }  # fmt: skip


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

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def gradients(self, names: Sequence[str]) -> list[Tensor]:
        """Those of the parameters of these optimizers."""
        return [p.grad for name in names for p in self._parameters(name) if p.grad is not None]

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
            if any(p.grad is not None for p in self._parameters(other)):
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
            average_gradients(self._parameters(name), loss.count)
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
                nn.utils.clip_grad_norm_(self._parameters(name), self.clip_norm)
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
