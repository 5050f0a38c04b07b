"""Tuner: the method. Θ, λ and σ with their optimizers, when they step, what limits λ, and what is known of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.allowance import LEAST, Allowance
from fxstn.bilevel.backtracking import Backtracking
from fxstn.bilevel.batches import Batch, BatchPreparer, first_part, unpack_of
from fxstn.bilevel.build import build_updates, double_decay
from fxstn.bilevel.cadence import Cadence, Counters
from fxstn.bilevel.counts import Mean
from fxstn.bilevel.evaluation import Evaluator, RecentBatches, diagnostics
from fxstn.bilevel.faults import LossGuard, Monitors
from fxstn.bilevel.history import SCALE, History, Row
from fxstn.bilevel.optim import generalisation_gap
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.running_means import RunningMeans
from fxstn.bilevel.shared_data import training_data_in_validation
from fxstn.bilevel.sources import unchanged_generators
from fxstn.bilevel.steps import GapLimit, Stepper
from fxstn.bilevel.temporary import WeightAverages
from fxstn.bilevel.totals import one_number
from fxstn.ir.input_errors import explained_errors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size


class BatchSource(Protocol):
    """Validation batches without end. size: of those that are asked for; None: not known yet."""

    size: int | None

    def next(self) -> tuple[object, bool]:
        """The next batch, and whether it begins a pass over the data."""
        ...

    def resize(self, size: int) -> None:
        """Use batches of about this many examples, unless a size is in use."""


class Tuner:
    """The method, whoever steps w₀: a `BilevelRunner`, or a loop of the user's own (`fxstn.tune`).
    Around each step of w₀ there are `before_step`, while the gradients of w₀ are at hand, and `after_step`. `evaluated_epoch`
    follows once in a while.

    problem: on its device.
    network: of the problem. None: a problem of the user's own.
    settings: of the run.
    recent: the training batches that evaluation estimates statistics on.
    valid: the batches of hyper steps.
    seed: of the noise of response and hyper steps; the same in all processes.
    weights: whether the tuner has the optimizer of w₀, too.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        network: SelfTuningNetwork | None,
        settings: Settings,
        device: torch.device,
        recent: RecentBatches,
        valid: BatchSource,
        seed: int,
        weights: bool = True,
    ) -> None:
        self.problem, self.network, self.settings, self.device = problem, network, settings, device
        self.valid, self.counters, self.schedule = valid, Counters(), settings.schedule
        self.guard, self.means = LossGuard(device), RunningMeans(device)
        self.prepare = BatchPreparer(device, settings.execution.memory_format, settings.unpack or unpack_of(network))
        self.autocast = settings.execution.autocast
        self.updates = build_updates(problem, network, settings, device, weights)
        optimizer = self.updates.optimizers.get("hyper.optimizer")
        self.cadence = Cadence(settings.response, settings.hyper, optimizer, self.counters)
        correction = settings.hyper.inner_correction
        self.stepper = Stepper(problem, self.updates, self.guard, self.prepare, correction, self.precision, seed)
        self.averages: WeightAverages | None = None
        if settings.ema is not None:
            averaged = (*problem.general_parameters(), *problem.response_parameters(), *problem.buffers())
            self.averages = WeightAverages(averaged, settings.ema)
        metrics = settings.metrics or {}
        steps = partial(getattr, self.counters, "steps")
        self.evaluator = Evaluator(problem, recent, self.averages, steps, metrics, self.prepare, self.precision)
        start = problem.values() if self.schedule is None else self.schedule.at(0)
        self.history = History.starting_at(start, network.hparams.hyperparameters if network else ())
        regularizing = [name for name, flag in zip(problem.values(), problem.regularizing(), strict=False) if flag]
        self.monitors = Monitors(problem.ranges(), regularizing)
        self.monitors.note(double_decay(self.updates, network))
        measured = settings.hyper.recalibrate > 0 and settings.schedule is None
        self.limit = GapLimit(optimizer, problem, measured)
        self.backtracking = Backtracking(optimizer, problem, self.limit.on and not problem.joint)

    def note_data(self, train_loader: object, valid_loader: object) -> None:
        """Warn where a network is to be tuned on training data. A problem of the user's own may mean it."""
        if self.network is not None and self.schedule is None:
            self.monitors.note(training_data_in_validation(train_loader, valid_loader))

    def precision(self) -> AbstractContextManager[object]:
        """A context for the forward of a loss."""
        if self.autocast is None and not torch.is_autocast_enabled(self.device.type):
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def epoch(self) -> int:
        """The number of the epoch under way, from 1."""
        return len(self.history) + 1

    @property
    def tunes(self) -> bool:
        """Whether hyper steps are due in this epoch."""
        return self.schedule is None and self.epoch > self.settings.hyper.warmup_epochs

    @property
    def notes(self) -> bool:
        """Whether a hyper step will read the gradient of the next inner step."""
        return self.tunes and self.cadence.ends_cycle_soon

    @property
    def responds(self) -> bool:
        """Whether there are steps of Θ alone."""
        own = "response.optimizer" in self.updates.optimizers and not self.problem.joint
        return own and self.schedule is None

    @property
    def time(self) -> str:
        """Of the step that comes next, for errors."""
        return f"epoch {self.epoch}, step {self.means.steps + 1}"

    def begin_epoch(self) -> None:
        """Prepare for a pass over the training data."""
        self.means.begin()
        self.problem.begins("train")

    def before_step(self) -> None:
        """Note Θᵀ∇L_T; the parameters of w₀ hold the gradient of the step that follows."""
        self.stepper.note_gradient(self.notes)

    def after_step(self, batches: list[Batch], losses: dict[str, Mean] | None) -> bool:
        """Do what is due after a step of w₀: a response step on its batches, hyper steps. Returns whether a cycle is over.

        losses: of the step of w₀, as far as they are known. None where its gradient overflowed in float16, so that nothing has
            changed and the next step takes the place of this one in the cycle.

        Raises BadLoss.
        """
        time = self.time
        if self.network is not None:  # a problem of the user's own may have batches of any kind
            self.valid.resize(batch_size(batches[0][0]))
        cycle_over = False
        if losses is not None:
            due, cycle_over = self.cadence.count()
            losses = losses | (self._respond(batches) if due and self.responds else {})
            if self.averages:
                self.averages.update()
        self.means.add(losses or {})
        if cycle_over or self.means.steps == 1 or not self.guard.first:
            self.guard.check_now_and_then(self.counters.steps, self.means.means, time)
        if cycle_over:
            for _ in range(self.settings.hyper.valid_steps if self.tunes else 0):
                while self.stepper.hyper(self._valid_batch(time)) is None:
                    pass  # its gradient overflowed: the next batch, at half the scale
                self.counters.hyper_steps += 1
            self.stepper.forget_notes()
            self.guard.check_now_and_then(self.counters.steps, dict, time)
        return cycle_over

    def _respond(self, batches: list[Batch]) -> dict[str, Mean]:
        """The loss of a response step. {} where its gradient overflowed: the next inner step brings another one."""
        loss = self.stepper.response(batches)
        if loss is None:
            return {}
        self.cadence.count_response()
        return {"response_loss": loss}

    def epoch_losses(self) -> dict[str, float]:
        """The mean losses of the epoch so far. Raises BadLoss."""
        self.guard.check(means := self.means.means(), f"epoch {self.epoch}, step {self.means.steps}")
        # NaN: a short epoch without a response step, or one in which float16 overflowed in every step
        columns = ["train_loss"] * ("optimizer" in self.updates.optimizers) + ["response_loss"] * self.responds
        return dict.fromkeys(columns, math.nan) | means

    @contextmanager
    def evaluated_epoch(self, loader: Iterable[object], losses: dict[str, float]) -> Iterator[Row]:
        """End an epoch: evaluate, limit λ by the generalisation gap, add a row to the history. Inside, the network is what was
        evaluated.

        loader: of the validation data.
        losses: of the epoch, for the row.

        Raises BadLoss.
        """
        allowance = self._allowance()
        with unchanged_generators(loader), self.evaluator.evaluating(allowance.statistics_batches):
            values, batch = self.evaluator.means(loader, "valid_loader")
            self.guard.check({"valid_loss": values["valid_loss"]}, f"epoch {self.epoch}")
            if self.limit.on and (count := allowance.loss_batches):
                losses = losses | {"clean_train_loss": self.evaluator.clean_train_loss(count)}
                self.limit.set(self._gap(losses | values, count))
            row = self._row({"epoch": self.epoch, **losses, **values}, batch, allowance.diagnostics)
            self.updates.end_epoch(row["valid_loss"])
            self.history.rows.append(row)
            self.means.begin()
            yield row
        if not distributed.rank():
            self.monitors.read(self.history.rows)

    def end_epoch(self, loader: Iterable[object]) -> None:
        """As `evaluated_epoch`, with the losses so far."""
        with self.evaluated_epoch(loader, self.epoch_losses()):
            pass

    def _allowance(self) -> Allowance:
        """What this evaluation may measure."""
        share, batches, steps = self.settings.hyper.evaluation_share, self.settings.accumulate, self.counters.steps
        return Allowance(share, max(0, steps - self.means.steps) * batches, steps * batches, self.valid.size)

    def _gap(self, row: Row, batches: int) -> float | None:
        """The generalisation gap, on `LEAST` training batches at least, those of earlier rows with them.

        row: with the losses of this epoch.
        batches: those of its clean training loss.
        """
        measured = [each for each in self.history.rows if math.isfinite(each.get("clean_train_loss", math.nan))]
        rows = [row, *measured[max(0, len(measured) + 1 - math.ceil(LEAST / batches)) :]]
        return generalisation_gap(*(sum(each[name] for each in rows) for name in ("clean_train_loss", "valid_loss")))

    def _row(self, row: Row, batch: Batch | None, diagnoses: bool) -> Row:
        """A row of the history, from its losses and a batch of validation.

        diagnoses: whether with diagnostics.
        """
        problem = self.problem
        row |= problem.values() | {SCALE + name: scale for name, scale in problem.scales().items()}
        if diagnoses and self.schedule is None and not distributed.any_process(batch is None, self.device):
            assert batch is not None
            with self.precision():
                measured = diagnostics(problem, self.network, batch, int(row["epoch"]))
            row |= distributed.mean(measured, self.device)
        row |= {name: one_number(f(row), f"columns[{name!r}]") for name, f in (self.settings.columns or {}).items()}
        row |= self.backtracking.review(row) | distributed.mean({"seconds": self.means.seconds()}, self.device)
        return row | {"seconds": round(row["seconds"], 3)}

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
                return first_part(pair, self.settings.hyper.fraction, least=2)
        raise ValueError(f"{self.prepare.place} has one example, as the one before, and the batch norm {norm!r} has one value "
                         "per channel to normalise by: give valid_loader a batch_size of 2 or more, or use "
                         "transform(..., statistics='running')")  # fmt: skip
