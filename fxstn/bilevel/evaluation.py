"""Means of losses and metrics, over an epoch and over a loader; the network as it is evaluated."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import Batch, BatchPreparer, first_part
from fxstn.bilevel.counts import IGNORED, as_loss
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.recalibration import EvaluatedStatistics
from fxstn.bilevel.sources import new_pass, unchanged_generators
from fxstn.bilevel.state import State
from fxstn.bilevel.temporary import WeightAverages, in_eval_mode
from fxstn.bilevel.totals import Metrics, Totals
from fxstn.ir.input_errors import explained_errors
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size

DIAGNOSED = 32  # examples of the batch that diagnostics are computed on, at most
# What a loss raises of a batch that it is not made for. No other error says so.
LOSS_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share, in [0, 1], of examples whose largest logit is the target class; NaN where there are none.

    output: (batch, classes).
    target: (batch,). The class -100 does not count.
    """
    return ((output.argmax(-1) == target).sum() / (target != IGNORED).sum()).item()


class EpochTensors:
    """What differs between processes within an epoch, such as statistics of batch norms. A part with a state in each process.

    It is evaluated and saved as the mean over the processes.
    """

    def __init__(self, module: nn.Module, averages: WeightAverages | None) -> None:
        self.module, self.averages = module, averages

    def tensors(self) -> list[Tensor]:
        """The floating-point buffers, and their averages."""
        buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]
        return buffers + (self.averages.of(buffers) if self.averages else [])

    def average(self) -> None:
        """Replace each tensor by its mean over the processes."""
        distributed.average(self.tensors(), constants=True)

    def state_dict(self) -> State:
        return {"tensors": self.tensors() if distributed.processes() > 1 else []}

    def load_state_dict(self, state: State) -> None:
        own = self.tensors() if distributed.processes() > 1 else []
        for tensor, saved in zip(own, state["tensors"], strict=True):
            tensor.copy_(saved)

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        """Nothing: those of process 0 are part of the problem's state."""


class RecentBatches(Protocol):
    """Training batches of the last steps."""

    @property
    def remembers(self) -> bool:
        """Whether there are any to be had."""
        ...

    def recent_or_first(self) -> Iterator[object]:
        """The recent batches; before there is one, first ones."""
        ...


class Evaluator:
    """Evaluates a problem as it is kept.

    train: remembers the batches on which statistics are estimated anew, if any.
    averages: the weights used; None: those of the last step.
    steps: returns the number of inner steps done.
    metrics: {name: f(output, target) → number}.
    precision: makes a context for the forward.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        train: RecentBatches,
        averages: WeightAverages | None,
        steps: Callable[[], int],
        metrics: Metrics,
        prepare: BatchPreparer,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.problem, self.train, self.averages, self.metrics = problem, train, averages, metrics
        self.prepare, self.precision = prepare, precision
        self.statistics = EvaluatedStatistics(problem, steps)
        self._entries = 0.0  # of the targets that the last evaluation counted
        self._warned = False

    @contextlib.contextmanager
    def evaluating(self, batches: int | None = None) -> Iterator[None]:
        """Inside, the network is what is evaluated and kept.

        batches: the number of recent ones that statistics are estimated on. None: all.
        """
        known = self.statistics.hold()
        with contextlib.ExitStack() as stack:
            stack.callback(self.statistics.note_parameters)
            if self.averages:
                stack.enter_context(self.averages.swapped())
            stack.enter_context(torch.inference_mode(False))  # so that autograd can record what a loss is a mean over
            stack.enter_context(self.precision())
            if self.train.remembers:
                stack.enter_context(
                    self.statistics.restored() if known else self.statistics.estimated(self._recent(batches))
                )
            yield

    def _recent(self, count: int | None) -> Iterator[Batch]:
        for batch in self._last(count):
            yield self.prepare(batch, "train_loader", "recalibration")

    def _last(self, count: int | None) -> Iterator[object]:
        """The last ones of the recent batches, so many, with the rest that a pass may have left besides; all for None."""
        batches = list(self.train.recent_or_first())
        if count is not None and len(batches) > count:
            before, last = map(self._examples, batches[-2:])
            batches = batches[-count - (last < before) :]
        yield from batches

    def _examples(self, batch: object) -> int:
        """How many a training batch has; 0 where that is not known, as in a problem of the user's own."""
        try:
            return batch_size(self.prepare(batch, "train_loader", "evaluation")[0])
        except ValueError:
            return 0

    def means(self, loader: Iterable[object], name: str) -> tuple[dict[str, float], Batch | None]:
        """ "valid_loss" and the metrics, over all batches of a loader as over one; and this process's first batch.

        name: what errors call the loader.

        None in place of the batch where this process's share is empty. Raises ValueError where the shares of all processes are
        empty, or nothing in them counts for the loss, and (TypeError) where the model or the loss cannot take a batch;
        TypeError where a metric returns no number.
        """
        totals, first = self._totals(loader, name, self.metrics)
        totals = totals.gather(self.prepare.device)
        self._entries = totals.entries
        return totals.means(name), first

    def clean_train_loss(self, batches: int | None = None) -> float:
        """The validation loss of the training batches of the last steps; NaN, with a warning, where it fails.

        batches: the number of them. None: all that are remembered.

        λ is not limited where it is not finite, as where a batch overflows: a warning, once in a run, says so.
        A loss that is a sum is brought to as many target entries as the last loader had.
        A validation loss may be meant for another kind of batch. Faults of the loader and of the device are raised.
        """
        totals, fault = self._losses_or_fault(self._last(batches), "train_loader")
        if totals is not None:
            if not totals.counts["valid_loss"]:
                return math.nan
            loss = totals.loss_for(self._entries)
            if not math.isfinite(loss):
                self._warn_not_finite(loss)
            return loss
        if not distributed.rank():
            text = f"λ is not limited for an epoch, because the validation loss of training batches cannot be computed{fault}; "
            warn_caller(text + "give a valid_loss_fn that takes them, too")
        return math.nan

    def loss_before_training(self, loader: Iterable[object]) -> float | None:
        """The validation loss with the statistics that norms have. No random number of the training is drawn.

        None where it fails, and the first step will say why, or is not finite.
        """
        with unchanged_generators(loader), torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            totals, _ = self._losses_or_fault(loader, "valid_loader")
        if totals is None or not totals.counts["valid_loss"]:
            return None
        loss = totals.means("valid_loader")["valid_loss"]
        return loss if math.isfinite(loss) else None

    def _losses_or_fault(self, batches: Iterable[object], name: str) -> tuple[Totals | None, str]:
        """The losses of all processes. None, with what happened in this one, where they cannot be computed in one of them."""
        totals, fault = Totals({}), ""
        try:
            totals, _ = self._totals(batches, name, {})
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except LOSS_ERRORS as error:
            fault = f": {type(error).__name__}: {error}"
        if distributed.any_process(bool(fault), self.prepare.device):
            return None, fault
        return totals.gather(self.prepare.device), ""

    def _warn_not_finite(self, loss: float) -> None:
        if not distributed.rank() and not self._warned:
            warn_caller(
                f"λ is not limited after an epoch in which the validation loss of training batches is {loss}, as now: the "
                "network or the loss overflows; use execution.autocast=torch.bfloat16 in place of float16, or scale the inputs"
            )
        self._warned = True

    def _totals(self, batches: Iterable[object], name: str, metrics: Metrics) -> tuple[Totals, Batch | None]:
        """This process's totals, and its first batch."""
        totals, evaluate = Totals(metrics), self.problem.evaluation()
        first: Batch | None = None
        with in_eval_mode(self.problem.evaluation_module()):
            for batch in new_pass(batches):
                inputs, target = pair = self.prepare(batch, name, "evaluation")
                first = first or pair
                with self.precision(), explained_errors(pair, self.prepare.place, self.problem):
                    value, output = evaluate(inputs, target)
                    loss = as_loss(value, inputs, target, "validation_loss")
                totals.add(loss, output, target)
        return totals, first


def diagnostics(
    problem: BilevelProblem, network: SelfTuningNetwork | None, batch: Batch, seed: int
) -> dict[str, float]:
    """Those of a problem, on the first DIAGNOSED examples of a batch; on all where a part is no batch, as nodes of a graph are.

    network: of the problem. None: a problem of the user's own, which may not take a part.
    """
    if network is not None:
        try:
            few = first_part(batch, min(1.0, DIAGNOSED / batch_size(batch[0])))
            return problem.diagnostics(*few, seed)
        except (RuntimeError, LookupError, ValueError):
            pass
    return problem.diagnostics(*batch, seed)
