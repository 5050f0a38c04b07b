"""Means of losses and metrics, over an epoch and over a loader; the network as it is evaluated and kept."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, SupportsFloat, TypedDict

import torch
from torch import Tensor, nn

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import Batch, BatchPreparer
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.recalibration import EvaluatedStatistics
from fxstn.bilevel.sources import new_pass
from fxstn.bilevel.state import State, on_device
from fxstn.bilevel.temporary import WeightAverages
from fxstn.ir.input_errors import explained_errors
from fxstn.ops.batch_axis import batch_size

# What a loss raises of a batch that it is not made for. No other error says so.
LOSS_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Metrics = dict[str, Callable[[Any, Any], SupportsFloat]]  # {name: f(output, target) → number}


class RunningMeans:
    """Mean losses of the epoch under way, and its time. A part with a state in each process.

    device: where sums are loaded to, and averaged over the processes.

    `steps` is the number of inner steps of the epoch; 0 between two epochs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget everything: an epoch begins, or is over."""
        self.steps, self._seconds = 0, 0.0  # seconds of the epoch before a resume
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._start = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one step, which stay on their device."""
        for name, loss in losses.items():
            self._totals[name] = self._totals[name] + loss if name in self._totals else 0.0 + loss
            self._counts[name] = self._counts.get(name, 0) + 1
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The mean of each loss over the steps that had it, and over the processes."""
        return distributed.mean(
            {name: total.item() / self._counts[name] for name, total in self._totals.items()}, self.device
        )

    def seconds(self) -> float:
        """Seconds of the epoch so far."""
        return self._seconds + time.perf_counter() - self._start

    def state_dict(self) -> State:
        return {
            "steps": self.steps,
            "totals": dict(self._totals),
            "counts": dict(self._counts),
            "seconds": self.seconds() if self.steps else 0.0,
        }

    def load_state_dict(self, state: State) -> None:
        self.begin()
        self.steps, self._seconds = state["steps"], state["seconds"]
        self._totals, self._counts = on_device(dict(state["totals"]), self.device), dict(state["counts"])

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        self.begin()


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share, in [0, 1], of examples whose largest logit is the target class.

    output: (batch, classes).
    target: (batch,).
    """
    return (output.argmax(-1) == target).float().mean().item()


def example_count(inputs: object, target: object) -> int:
    """What a mean loss is the mean over: the entries of the target, one per example or per time of an example."""
    return target.numel() if isinstance(target, Tensor) and target.dim() else batch_size(inputs)


def one_number(value: object, function: str) -> float:
    """The number that a user's function returned. Raises TypeError where it is not one number.

    function: what the error calls it.
    """
    cause: Exception | None = None
    if isinstance(value, SupportsFloat):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            cause = error
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{function} must return one number, such as a mean; it returns {kind}") from cause


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


class Best(TypedDict):
    """An epoch, its validation loss, and the state_dict of the model that it would export."""

    epoch: int
    valid_loss: float
    model: dict[str, Any]


class BestModel:
    """The model of the epoch with the lowest validation loss. `record` is None before the first epoch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record: Best | None = None

    def offer(self, epoch: int, valid_loss: float, problem: BilevelProblem) -> bool:
        """Keep the model of a problem where it is better; returns whether it is."""
        if self.record is not None and not valid_loss < self.record["valid_loss"]:
            return False
        model = {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # extra state of a module
            for name, value in problem.export().state_dict().items()
        }
        self.record = {"epoch": epoch, "valid_loss": valid_loss, "model": model}
        return True

    def state_dict(self) -> State:
        return {"record": self.record}

    def load_state_dict(self, state: State) -> None:
        self.record = on_device(state["record"], self.device)


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
        train: ResumableLoader,
        averages: WeightAverages | None,
        steps: Callable[[], int],
        metrics: Metrics,
        prepare: BatchPreparer,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.problem, self.train, self.averages, self.metrics = problem, train, averages, metrics
        self.prepare, self.precision = prepare, precision
        self.statistics = EvaluatedStatistics(problem, steps)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is what is evaluated and kept."""
        known = self.statistics.hold()
        with contextlib.ExitStack() as stack:
            stack.callback(self.statistics.note_parameters)
            if self.averages:
                stack.enter_context(self.averages.swapped())
            stack.enter_context(self.precision())
            if self.train.remembers:
                stack.enter_context(self.statistics.restored() if known else self.statistics.estimated(self._recent()))
            yield

    def _recent(self) -> Iterator[Batch]:
        for batch in self.train.recent_or_first():
            yield self.prepare(batch, "train_loader", "recalibration")

    def means(self, loader: Iterable[object], name: str) -> tuple[dict[str, float], Batch | None]:
        """Means over the examples of a loader of "valid_loss" and the metrics; and this process's first batch.

        name: what errors call the loader.

        None in place of the batch where this process's share is empty. Raises ValueError where the shares of all processes are
        empty, and (TypeError) where the model or the loss cannot take a batch; TypeError where a metric returns no number.
        """
        sums, first = self._sums(loader, name, self.metrics)
        return _means(sums, name, self.prepare.device), first

    def clean_train_loss(self) -> float:
        """The mean of the validation loss over the training batches of the last steps; NaN, with a warning, where it fails.

        A validation loss may be meant for another kind of batch. Faults of the loader and of the device are raised.
        """
        sums: dict[str, float] = {}
        fault, batches = "", list(self.train.recent_or_first())
        try:
            sums, _ = self._sums(batches, "train_loader", {})
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except LOSS_ERRORS as error:
            fault = f": {type(error).__name__}: {error}"
        if not distributed.any_process(bool(fault), self.prepare.device):
            return _means(sums, "train_loader", self.prepare.device)["valid_loss"]
        if not distributed.rank():
            text = f"λ is not limited for an epoch, because the validation loss of training batches cannot be computed{fault}; "
            warn_caller(text + "give a valid_loss_fn that takes them, too")
        return math.nan

    def _sums(self, batches: Iterable[object], name: str, metrics: Metrics) -> tuple[dict[str, float], Batch | None]:
        """This process's sums over examples, and their number, "examples"; its first batch."""
        sums: dict[str, float] = dict.fromkeys(("examples", "valid_loss", *metrics), 0.0)
        evaluate = self.problem.evaluation()
        first: Batch | None = None
        for batch in new_pass(batches):
            inputs, target = pair = self.prepare(batch, name, "evaluation")
            first = first or pair
            with self.precision(), explained_errors(pair, self.prepare.place, self.problem):
                loss, output = evaluate(inputs, target)
            weight = example_count(inputs, target)
            values = {key: one_number(f(output, target), f"metrics[{key!r}]") for key, f in metrics.items()}
            for key, value in {"valid_loss": loss.item(), **values}.items():
                sums[key] += value * weight
            sums["examples"] += weight
        return sums, first


def _means(sums: dict[str, float], name: str, device: torch.device) -> dict[str, float]:
    """Means over the examples of all processes.

    name: of the loader.

    Raises ValueError where there is no example.
    """
    sums = distributed.total(sums, device)
    if not (examples := sums.pop("examples")):
        raise ValueError(f"{name} is empty: it yielded no batch")
    return {key: total / examples for key, total in sums.items()}
