"""The network as it is evaluated and kept, and means of the validation loss and of metrics over all processes' batches."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import BatchPreparer
from fxstn.bilevel.faults import RunWarning
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.streams import ResumableLoader
from fxstn.bilevel.tally import count, one_number
from fxstn.bilevel.updates import Averaged
from fxstn.ir.input_errors import explained_errors

Metrics = dict[str, Callable[[Any, Any], float]]


class Evaluator:
    """Evaluates a problem as it is kept.

    train: remembers the batches on which statistics are estimated anew, if any. averaged: the weights used, if not those of the
    last step. metrics: {name: f(output, target) → number}. precision: a context for the forward.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        train: ResumableLoader,
        averaged: Averaged | None,
        metrics: Metrics,
        place: BatchPreparer,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.problem, self.train, self.averaged, self.metrics = problem, train, averaged, metrics
        self.place, self.precision = place, precision

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The network is what is evaluated and kept: averaged, with statistics of its own."""
        with contextlib.ExitStack() as stack:
            if self.averaged:
                stack.enter_context(self.averaged.in_place())
            stack.enter_context(self.precision())
            if self.train.remembers:
                recent = (self.place(batch, "train_loader", "recalibration") for batch in self.train.recent_or_first())
                stack.enter_context(self.problem.recalibrated(recent))
            yield

    def means(self, loader: Any, name: str) -> tuple[dict[str, float], tuple]:
        """Of "valid_loss" and the metrics over the examples of a loader of this name, and this process's first batch.

        () in place of a batch where its share is empty. Raises ValueError where that of all processes is, and (TypeError) where
        the model or the loss cannot take a batch; TypeError where a metric gives no number.
        """
        sums, first = self._sums(loader, name, self.metrics)
        return _means(sums, name, self.place.device), first

    def clean_train_loss(self) -> float:
        """The mean of the validation loss over the last steps' training batches; NaN, and a warning, where that fails.

        A loss function that was given for another kind of batch may raise anything; lack of memory is raised.
        """
        sums: dict[str, float] = {}
        fault = ""
        try:
            sums, _ = self._sums(self.train.recent_or_first(), "train_loader", {})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            fault = f": {type(error).__name__}: {error}"
        if not distributed.any_of(bool(fault), self.place.device):
            return _means(sums, "train_loader", self.place.device)["valid_loss"]
        if not distributed.rank():
            text = f"λ is not limited for an epoch, for the validation loss of training batches cannot be had{fault}; "
            warnings.warn(text + "give a valid_loss_fn that takes them, too", RunWarning, stacklevel=5)
        return math.nan

    def _sums(self, batches: Iterable[Any], name: str, metrics: Metrics) -> tuple[dict[str, float], tuple]:
        """This process's sums over examples, and their number, "examples"; its first batch, or ()."""
        sums: dict[str, float] = dict.fromkeys(("examples", "valid_loss", *metrics), 0.0)
        evaluation = self.problem.evaluation()
        first: tuple = ()
        for batch in batches:
            inputs, target = pair = self.place(batch, name, "evaluation")
            first = first or pair
            with self.precision(), explained_errors(pair, self.place.where, self.problem):
                loss, output = evaluation(inputs, target)
            weight = count(inputs, target)
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
