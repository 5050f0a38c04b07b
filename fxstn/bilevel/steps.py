"""One optimizer step each: of w₀, of Θ, of λ and σ; and the limit of λ's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import Batch, BatchPreparer
from fxstn.bilevel.counts import Count, Loss, Mean, as_loss, either, entries, positive, without_empty
from fxstn.bilevel.faults import BadLoss, LossGuard
from fxstn.bilevel.foreign import ForeignGradients
from fxstn.bilevel.noise import own_generators, seed_of_step
from fxstn.bilevel.optim import SettlingAdam, set_gap
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.scaling import MOST_OVERFLOWS, LossScaler
from fxstn.bilevel.state import State, on_device
from fxstn.bilevel.updates import Updates
from fxstn.ir.input_errors import explained_errors


class Stepper:
    """Runs one optimizer step of each kind.

    problem: has the losses.
    updates: steps the optimizers.
    guard: checks the hyper step's loss.
    prepare: has moved the batches to the device, and names the last one in errors.
    correction: c of `fxstn.HyperSettings`, inner_correction.
    precision: makes a context for the forward of a loss.
    seed: of the noise of response and hyper steps, which draw from generators of their own.

    `training_hypergradients` are Θᵀ∇L_T of the inner steps since the last hyper step, and `noted_entries` the numbers of target
    entries that they are of, where losses are sums. `replays`: whether steps may run as CUDA graphs, which write over the
    gradients of the step before.

    Every step raises ValueError (TypeError) where the model or its loss cannot take a batch, and where the loss has no
    gradient; RuntimeError where it has gradients for parameters that another step learns; BadLoss.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        updates: Updates,
        guard: LossGuard,
        prepare: BatchPreparer,
        correction: float,
        precision: Callable[[], AbstractContextManager[object]],
        seed: int,
    ) -> None:
        self.problem, self.updates, self.guard, self.prepare = problem, updates, guard, prepare
        self.correction, self.precision, self.seed = correction, precision, seed
        self.training_hypergradients: list[Tensor] = []
        self.noted_entries: list[Count] = []
        self.replays = False
        self._additive: bool | None = None  # whether losses are sums; None: no loss was seen yet
        self._draws = 0  # response and hyper steps done
        self._foreign = ForeignGradients()

    def inner(self, batches: Sequence[Batch], tunes: bool) -> Mean | None:
        """Step w₀, and Θ too for a joint problem; returns the loss. None where the gradient overflowed: nothing has changed.

        tunes: whether a hyper step will follow.
        """
        names = ("optimizer", "response.optimizer") if self.problem.joint else ("optimizer",)
        loss = self._gradient("train_loss", self.problem.general_loss, batches, names)
        self._foreign.warn_of_untrained(names)
        if loss is None:
            return None
        self.problem.add_decay()
        self.note_gradient(tunes)
        self.note_entries(batches)
        self.updates.step(*names)
        return loss

    def note_gradient(self, tunes: bool) -> None:
        """Note Θᵀ∇L_T of an inner step, before it; the parameters of w₀ hold the gradient.

        tunes: whether a hyper step will follow.
        """
        if self.correction and tunes:
            gradient = self.problem.training_hypergradient()
            self.training_hypergradients += [gradient] if gradient is not None else []

    def note_entries(self, batches: Sequence[Batch]) -> None:
        """Note how many target entries the gradient noted last is of, unless losses are means.

        batches: of its step.
        """
        if self._additive is not False and len(self.noted_entries) < len(self.training_hypergradients):
            self.noted_entries.append(sum(entries(*batch) for batch in batches))

    def forget_notes(self) -> None:
        """A hyper step has read what was noted."""
        self.training_hypergradients.clear()
        self.noted_entries.clear()

    def response(self, batches: Sequence[Batch]) -> Mean | None:
        """Step Θ; returns the loss. None where the gradient overflowed: nothing has changed."""
        with self._own_noise():
            loss = self._gradient("response_loss", self.problem.response_loss, batches, ("response.optimizer",))
        if loss is not None:
            self._draws += 1
            self.updates.step("response.optimizer")
        return loss

    def hyper(self, batch: Batch) -> Mean | None:
        """Step λ, and σ where it is tuned; returns the loss. None where the gradient overflowed: nothing has changed."""
        names = tuple(name for name in ("hyper.optimizer", "hyper.scale_optimizer") if name in self.updates.optimizers)
        with self._own_noise():
            loss = self._gradient("hyper_loss", self.problem.hyper_loss, [batch], names)
        if loss is None:
            return None
        self._draws += 1
        self._leave_out_bad(loss, names)
        noted = self.training_hypergradients
        if self._additive:  # sums over batches of other sizes: per entry, they are as means
            own, *counts = self._entries_of_all(batch)
            torch._foreach_div_(self.updates.gradients(names), own)
            noted = [gradient / count for gradient, count in zip(noted, counts, strict=True)]
        if noted:
            (parameter,) = self.problem.hyper_parameters()
            assert parameter.grad is not None
            gradients = torch.stack(noted).nan_to_num_(0.0, 0.0, 0.0)  # a step may leave out weights that overflowed
            parameter.grad.sub_(gradients.mean(0), alpha=self.correction)
        self.updates.step(*names)
        return loss

    def _entries_of_all(self, batch: Batch) -> Iterable[Tensor]:
        """The numbers of target entries in all processes: of this batch, and of each noted gradient."""
        numbers = [
            torch.as_tensor(number, device=self.prepare.device) for number in (entries(*batch), *self.noted_entries)
        ]
        distributed.average([counts := torch.stack(numbers).to(torch.get_default_dtype())])
        return counts.mul_(distributed.processes()).clamp_(min=1).unbind()

    def _leave_out_bad(self, loss: Mean, names: Sequence[str]) -> None:
        """Note the loss of a hyper step for the guard, and set its gradient to zero where it is a bad one.

        The host does not wait for the device: the guard checks it later, and until then no NaN has reached λ.
        """
        bad = self.guard.note("hyper_loss", loss, self.prepare.time)
        for gradient in self.updates.gradients(names):
            gradient.masked_fill_(bad, 0.0)

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Inside, noise depends on the seed and on the number of this step alone."""
        seed = seed_of_step(self.seed, self._draws)
        self.problem.begins_step(seed)
        with own_generators(seed, self.prepare.device, self.problem.draws_in_python):
            yield

    def _gradient(
        self, name: str, objective: Callable[..., object], batches: Sequence[Batch], names: tuple[str, ...]
    ) -> Mean | None:
        """Leave the gradient of the loss of all batches as if they were one, at its true size; returns that loss.

        name: of the loss.
        names: of the optimizers that step next.

        None where the gradient overflowed in float16. It is dropped, and buffers and carried states are those of before: batch
        norms would keep an infinity for ever. Raises BadLoss where no scale of the loss helps.
        """
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        scaler = self.updates.scalers[name]
        buffers = [(buffer, buffer.clone()) for buffer in self.problem.buffers()] if scaler.enabled else []
        local = self.problem.local_state() if scaler.enabled else {}
        loss = self._backward(objective, batches, names, scaler)
        loss = loss.copy() if self.replays else loss
        if self.updates.ready(names, scaler, loss):
            if name != "hyper_loss":  # of which all are noted
                self.guard.note_first(name, loss, self.prepare.time)
            return loss
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        self.problem.load_local_state(local)
        if scaler.overflows >= MOST_OVERFLOWS:
            times = f"{scaler.overflows} times in a row (bfloat16 has more range), the last time"
            raise BadLoss(name, f"= {loss.value.item():.4g} overflowed float16 {times}", self.prepare.time)
        return None

    def _backward(
        self, objective: Callable[..., object], batches: Sequence[Batch], names: Sequence[str], scaler: LossScaler
    ) -> Mean:
        """Leave the scaled gradient of the loss of all batches as if they were one; returns that loss.

        The counts of later batches are not known yet. So the loss of each is weighted relative to the first, which is a plain
        mean where the counts are equal, and the gradient gets its true size at the end.
        """
        values: list[Tensor] = []
        count: Count = 0.0
        first: Count = 1.0
        for number, batch in enumerate(batches):
            loss, total = self._loss(objective, batch, len(batches))
            if len(batches) == 1:
                self._differentiate(scaler.scale(total), names)
                return Mean(total.detach(), loss.count)
            value = without_empty(total.detach(), loss.count)
            first = first if number else positive(loss.count)
            share = loss.count / first
            self._differentiate(scaler.scale(total * share / len(batches)), names)
            values.append(value * share)
            count = count + loss.count
        rest = len(batches) * first / positive(count)
        self.updates.multiply_gradients(names, rest)
        return Mean(torch.stack(values).mean() * rest, either(loss.additive, 1.0, count))

    def _differentiate(self, total: Tensor, names: Sequence[str]) -> None:
        """Run the backward pass of a scalar. How far that of a user's own problem reaches, `Updates.ready` checks."""
        with nullcontext() if self.updates.check else self._foreign.spare(names, total, self.updates.parameters):
            total.backward()

    def _loss(self, objective: Callable[..., object], batch: Batch, batches: int) -> tuple[Loss, Tensor]:
        """The loss of a batch, and the scalar to minimise.

        batches: the number of them in this step.
        """
        with self.precision(), explained_errors(batch, self.prepare.place, self.problem):
            loss = as_loss(objective(*batch), *batch, objective.__name__)
            total = loss.total(batches * distributed.processes())
            self._additive = bool(loss.additive) if self._additive is None else self._additive
        if not total.requires_grad:
            raise ValueError(f"{self.prepare.place}: {objective.__name__} has no gradient; what the model puts out must "
                             "depend on its trainable parameters, without .detach(), no_grad or all of them "
                             "frozen")  # fmt: skip
        return loss, total

    def state_dict(self) -> State:
        noted = {
            "training_hypergradients": list(self.training_hypergradients),
            "noted_entries": list(self.noted_entries),
        }
        return {**noted, "seed": self.seed, "draws": self._draws}

    def load_state_dict(self, state: State) -> None:
        self.training_hypergradients = list(on_device(state["training_hypergradients"], self.prepare.device))
        self.noted_entries = list(on_device(state["noted_entries"], self.prepare.device))
        self.seed, self._draws = state["seed"], state["draws"]


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
        self.optimizer, self.problem, self.regularizing = optimizer, problem, tuple(problem.regularizing())
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
        gap = gap if self.on else None
        self.problem.follow_gap(gap)
        if self.optimizer is not None and self.regularizing:
            set_gap(self.optimizer, gap, self.regularizing)

    def state_dict(self) -> State:
        """Nothing: the gap is part of the optimizer's state."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Go on with the gap that is in the optimizer's state, or lift it where this run does not measure one."""
        self.set(self.optimizer.param_groups[0]["gap"] if self.on and self.optimizer is not None else None)
