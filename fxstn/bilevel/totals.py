"""Sums of a loss and of metrics over the batches of an evaluation, and the means that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.counts import Loss

Metrics = dict[str, Callable[[Any, Any], SupportsFloat | tuple[SupportsFloat, SupportsFloat]]]
# {name: f(output, target) → a number, the mean over the batch, or (sum, count)}


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


class Totals:
    """Sums over batches, each with what it is to be divided by.

    metrics: of the evaluation.

    `entries` is the number of target entries that the loss did not ignore.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.sums = dict.fromkeys(("valid_loss", *metrics), 0.0)
        self.counts = dict(self.sums)
        self.batches = self.entries = 0.0
        self._additive = 0.0  # number of losses that were sums

    def add(self, loss: Loss, output: object, target: object) -> None:
        """Add a batch. A mean over nothing, as torch's NaN for a batch of padding alone, adds nothing."""
        number = float(loss.entries)
        self._add("valid_loss", loss.data.item(), float(loss.count))
        for name, metric in self.metrics.items():
            value, function = metric(output, target), f"metrics[{name!r}]"
            if isinstance(value, (tuple, list)) and len(value) == 2:
                self.sums[name] += one_number(value[0], function)
                self.counts[name] += one_number(value[1], function)
            else:
                self._add(name, one_number(value, function), number)
        self.batches, self.entries = self.batches + 1, self.entries + number
        self._additive += float(loss.additive)

    def _add(self, name: str, mean: float, count: float) -> None:
        self.sums[name] += mean * count if count else 0.0
        self.counts[name] += count

    def gather(self, device: torch.device) -> Totals:
        """Those of all processes. Several processes: all must call it."""
        result = Totals(self.metrics)
        result.sums = distributed.total(self.sums, device)
        result.counts = distributed.total(self.counts, device)
        numbers = {"batches": self.batches, "entries": self.entries, "additive": self._additive}
        result.batches, result.entries, result._additive = distributed.total(numbers, device).values()
        return result

    def means(self, loader: str) -> dict[str, float]:
        """The loss and the metrics, as of one batch of everything: a loss that is a sum is the sum.

        loader: what errors call the source of the batches.

        A metric is NaN where nothing in the batches counts for it, as the recall of a class that does not occur.

        Raises ValueError where there was no batch, or where nothing in them counts for the loss.
        """
        if not self.batches:
            raise ValueError(f"{loader} is empty: it yielded no batch")
        if not self.counts["valid_loss"]:
            raise ValueError(
                f"{loader} has nothing that valid_loss is a mean over: all its targets are ignored, or padding"
            )
        means = {name: total / count if (count := self.counts[name]) else math.nan for name, total in self.sums.items()}
        return means | ({"valid_loss": self.sums["valid_loss"]} if self._additive else {})

    def loss_for(self, number: float) -> float:
        """The loss, brought to another number of entries where it is a sum."""
        share = self.entries / number if self._additive else self.counts["valid_loss"]
        return self.sums["valid_loss"] / share
