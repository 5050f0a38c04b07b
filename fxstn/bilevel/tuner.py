"""Tuner: the alternation of Alg. 1 over the batches of an epoch: inner steps, response steps, hyper steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import Batch, BatchPreparer
from fxstn.bilevel.counts import Mean
from fxstn.bilevel.evaluation import Evaluator, RunningMeans
from fxstn.bilevel.faults import LossGuard, warn_caller
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.state import State
from fxstn.bilevel.steps import Stepper
from fxstn.bilevel.temporary import WeightAverages
from fxstn.bilevel.totals import Metrics
from fxstn.bilevel.updates import OptimizerLike, Updates, build_optimizers
from fxstn.ir.input_errors import explained_errors
from fxstn.network import SelfTuningNetwork


def build_updates(
    problem: BilevelProblem, network: SelfTuningNetwork | None, settings: Settings, device: torch.device
) -> Updates:
    """The optimizers of a run, and what is between a backward pass and their steps.

    network: of the problem. None: a problem of the user's own.

    Warns where weight decay is tuned and also set in an optimizer. Raises ValueError where float16 autocast would have to scale
    gradients that are in float16 themselves.
    """
    choices: dict[str, OptimizerLike] = {
        "optimizer": settings.optimizer,
        "response.optimizer": settings.response.optimizer,
        "hyper.optimizer": settings.hyper.optimizer,
        "hyper.scale_optimizer": settings.hyper.scale_optimizer,
    }
    optimizers = build_optimizers(problem, choices, network is not None and network.structured)
    for name in ("optimizer", "response.optimizer"):
        groups = optimizers[name].param_groups if name in optimizers else []
        if network is not None and network.terms.penalties and any(g.get("weight_decay") for g in groups):
            warn_caller(
                f"weight decay is tuned and also set in {name}: both act; set weight_decay=0 there", UserWarning
            )
    scaled = settings.execution.autocast is torch.float16
    if scaled:
        _check_no_float16(network.model if network is not None else problem)
    scalers = {name: LossScaler(device, scaled) for name in ("train_loss", "response_loss", "hyper_loss")}
    schedulers, step_schedulers = settings.schedulers, settings.step_schedulers
    return Updates(optimizers, schedulers, step_schedulers, settings.clip_norm, scalers, check=network is None)


def _check_no_float16(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype is torch.float16:
            raise ValueError(
                f"execution.autocast=torch.float16 is for a network in float32, and {name} is in float16: leave out "
                ".half(), or freeze that layer"
            )


@dataclass
class Counters:
    """What a run has done so far: inner steps, response steps alone, hyper steps, and how often it went back.

    A step whose gradient overflowed in float16 is none.

    response_due: whether the next inner step brings a response step, because that of this one overflowed.
    """

    steps: int = 0
    response_steps: int = 0
    response_due: bool = False
    hyper_steps: int = 0
    rollbacks: int = 0

    def state_dict(self) -> State:
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Tuner:
    """Runs the steps of an epoch.

    problem: on its device.
    network: of the problem. None: a problem of the user's own.
    train_loader, valid_loader, settings: of the runner.
    batches: the number of them in train_loader. None: unknown.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        network: SelfTuningNetwork | None,
        train_loader: Iterable[object],
        valid_loader: Iterable[object],
        settings: Settings,
        device: torch.device,
        batches: int | None,
    ) -> None:
        self.problem, self.network, self.settings, self.device = problem, network, settings, device
        self.schedule, self.counters = settings.schedule, Counters()
        self.train = ResumableLoader(train_loader, "train_loader", settings.hyper.recalibrate)
        self.valid = ResumableLoader(valid_loader, "valid_loader")
        self.length = math.ceil(batches / settings.accumulate) if batches else None  # inner steps of an epoch
        self.lengths_differ = distributed.lengths_differ(train_loader)
        self.guard, self.means = LossGuard(), RunningMeans(device)
        autocast = settings.execution.autocast
        self.prepare = BatchPreparer(device, settings.execution.memory_format, settings.unpack)
        self.precision = partial(torch.autocast, device.type, autocast, enabled=autocast is not None)
        self.updates = build_updates(problem, network, settings, device)
        correction = settings.hyper.inner_correction
        self.stepper = Stepper(problem, self.updates, self.guard, self.prepare, correction, self.precision)
        self.averages: WeightAverages | None = None
        if settings.ema is not None:
            averaged = (*problem.general_parameters(), *problem.response_parameters(), *problem.buffers())
            self.averages = WeightAverages(averaged, settings.ema)

    def evaluator(self, metrics: Metrics) -> Evaluator:
        """Evaluates the problem as this run keeps it."""
        return Evaluator(
            self.problem, self.train, self.averages, lambda: self.counters.steps, metrics, self.prepare, self.precision
        )

    def epoch(self, number: int, pause: Callable[[], None]) -> dict[str, float]:
        """Train for the epoch of this number, or for the rest of it; returns the mean losses.

        pause: called between cycles; in a process of its own between inner steps, too.

        Raises BadLoss, and ValueError where the train loader yields no batch.
        """
        means, settings = self.means, self.settings
        if not means.steps:
            means.begin()
            self.problem.begins("train")
            self.train.begin()
        self.problem.train()
        tunes = self.schedule is None and number > settings.hyper.warmup_epochs
        while batches := self._next_batches():
            time = f"epoch {number}, step {means.steps + 1}"
            self._replay(number - 1, means.steps + 1)
            losses = self.inner_step([self.prepare(b, "train_loader", time) for b in batches], tunes)
            means.add(losses)
            cycle_over = bool(losses) and self.counters.steps % settings.hyper.train_steps == 0
            if cycle_over or means.steps == 1 or not self.guard.first:
                self.guard.check(means.means(), time)
            if cycle_over:
                for _ in range(settings.hyper.valid_steps if tunes else 0):
                    while self.stepper.hyper(self._valid_batch(time)) is None:
                        pass  # its gradient overflowed: the next batch, at half the scale
                    self.counters.hyper_steps += 1
                self.stepper.training_hypergradients.clear()
            if cycle_over or distributed.processes() == 1:
                pause()
        if not means.steps:
            raise ValueError("train_loader is empty: it yielded no batch")
        self.guard.check(epoch_means := means.means(), f"epoch {number}, step {means.steps}")
        # NaN: a short epoch without a response step, or one in which float16 overflowed in every step
        columns = ("train_loss", "response_loss") if self._responds else ("train_loss",)
        return dict.fromkeys(columns, math.nan) | epoch_means

    @property
    def _responds(self) -> bool:
        """Whether there are steps of Θ alone."""
        return "response.optimizer" in self.updates.optimizers and not self.problem.joint and self.schedule is None

    def _next_batches(self) -> list[object]:
        """The batches of the next inner step; none, in all processes, where one of them has none left."""
        batches = self.train.take(self.settings.accumulate)
        if self.lengths_differ and distributed.any_process(not batches, self.device):
            self.train.close()
            return []
        return batches

    def _replay(self, epochs: int, step: int) -> None:
        """Set λ to where the schedule, if there is one, has it at the end of this step after so many epochs."""
        if self.schedule is not None and self.network is not None:
            length = self.length or step  # of a loader that does not know it: the values at the end of the epoch
            self.network.hparams.set(self.schedule.at(epochs + step / length))

    def inner_step(self, batches: list[Batch], tunes: bool) -> dict[str, Mean]:
        """One step of w₀ and, when it is due, one of Θ on training batches; of both at once for a joint problem.

        tunes: whether hyper steps follow.

        Returns the loss of each step done. Empty where the gradient of w₀ overflowed in float16: nothing has changed, and the
        next inner step takes the place of this one in the cycle.
        """
        loss = self.stepper.inner(batches, tunes)
        if loss is None:
            return {}
        losses, counters = {"train_loss": loss}, self.counters
        counters.steps += 1
        if self._responds and (counters.response_due or counters.steps % self.settings.response.every == 0):
            response_loss = self.stepper.response(batches)
            counters.response_due = response_loss is None
            if response_loss is not None:
                losses["response_loss"] = response_loss
                counters.response_steps += 1
        if self.averages:
            self.averages.update()
        return losses

    def _valid_batch(self, time: str) -> Batch:
        """The next validation batch that the network can normalise.

        Raises ValueError where the next two batches have one example each, and a batch norm would have one value per channel.
        """
        for _ in range(2):
            batch, first = self.valid.next()
            if first:
                self.problem.begins("valid")
            pair = self.prepare(batch, "valid_loader", time)
            with self.precision(), explained_errors(pair, self.prepare.place, self.problem):
                norm = self.problem.norm_without_statistics(pair[0])
            if not norm:
                return pair
        raise ValueError(f"{self.prepare.place} has one example, as the one before, and the batch norm {norm!r} has one value "
                         "per channel to normalise by: give valid_loader a batch_size of 2 or more, or use "
                         "transform(..., statistics='running')")  # fmt: skip
