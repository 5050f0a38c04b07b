"""The network as it is evaluated and kept: with averaged weights, statistics of its own, and the best of its epochs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypedDict

import torch
from torch import Tensor, nn

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import Batch, BatchPreparer, ResumableLoader
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.means import Metrics, example_count, one_number
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import State, on_device
from fxstn.bilevel.temporary import swapped_tensors
from fxstn.ir.input_errors import explained_errors


class WeightAverages:
    """Exponential moving averages of the floating-point tensors among some: a ← decay a + (1 − decay) x."""

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._live = [t for t in tensors if t.is_floating_point()]
        self.averages = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Count the tensors as they are now."""
        torch._foreach_lerp_(self.averages, [t.detach() for t in self._live], 1 - self.decay)

    def of(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The averages of some of the tensors."""
        ids = {id(tensor) for tensor in tensors}
        return [average for live, average in zip(self._live, self.averages, strict=True) if id(live) in ids]

    def swapped(self) -> AbstractContextManager[None]:
        """Inside, the tensors have their averages."""
        return swapped_tensors(self._live, self.averages)

    def state_dict(self) -> State:
        return {"averages": self.averages}

    def load_state_dict(self, state: State) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


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
    model: dict[str, Tensor]


class BestModel:
    """The model of the epoch with the lowest validation loss. `record` is None before the first epoch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record: Best | None = None

    def offer(self, epoch: int, valid_loss: float, problem: BilevelProblem) -> bool:
        """Keep the model of a problem where it is better; returns whether it is."""
        if self.record is not None and not valid_loss < self.record["valid_loss"]:
            return False
        model = {name: value.clone() for name, value in problem.export().state_dict().items()}
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
    metrics: {name: f(output, target) → number}.
    precision: makes a context for the forward.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        train: ResumableLoader,
        averages: WeightAverages | None,
        metrics: Metrics,
        prepare: BatchPreparer,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.problem, self.train, self.averages, self.metrics = problem, train, averages, metrics
        self.prepare, self.precision = prepare, precision

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is what is evaluated and kept."""
        with contextlib.ExitStack() as stack:
            if self.averages:
                stack.enter_context(self.averages.swapped())
            stack.enter_context(self.precision())
            if self.train.remembers:
                recent = (
                    self.prepare(batch, "train_loader", "recalibration") for batch in self.train.recent_or_first()
                )
                stack.enter_context(self.problem.recalibrated(recent))
            yield

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

        A validation loss that is meant for another kind of batch may raise anything. Only a lack of memory is raised.
        """
        sums: dict[str, float] = {}
        fault = ""
        try:
            sums, _ = self._sums(self.train.recent_or_first(), "train_loader", {})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            fault = f": {type(error).__name__}: {error}"
        if not distributed.any_of(bool(fault), self.prepare.device):
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
        for batch in batches:
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
    """Over the examples of all processes. Raises ValueError where there is none; name: of the loader."""
    sums = distributed.total(sums, device)
    if not (examples := sums.pop("examples")):
        raise ValueError(f"{name} is empty: it yielded no batch")
    return {key: total / examples for key, total in sums.items()}
