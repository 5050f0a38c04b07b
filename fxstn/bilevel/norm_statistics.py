"""Statistics of batch norms for an evaluation: those of some batches, drawn towards the running ones where they are noisy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fxstn.bilevel import distributed
from fxstn.bilevel.temporary import swapped_tensors
from fxstn.ops.precision import widen


class _Samples:
    """Mean and unbiased variance of each channel, of some batches: of each the mean over the calls of a norm.

    A batch weighs as much as it has values per channel, so that the rest at the end of a pass says little. A call that
    overflows counts for nothing: `weights` has the values of the others, in units of those of the first call, and the host does
    not wait to know.
    """

    def __init__(self) -> None:
        self.unit = 0  # values per channel of the first call
        self.weights: dict[int, Tensor] = {}  # by the number of the batch
        self.sums: dict[int, Tensor] = {}  # (2, channels)

    def add(self, statistics: Tensor, values: int, batch: int) -> None:
        """Count a call. statistics: (2, channels), of so many values. batch: its number."""
        self.unit = self.unit or values
        finite, weight = torch.isfinite(statistics).all(), values / self.unit
        for sums, value in (
            (self.weights, finite.to(statistics.dtype) * weight),
            (self.sums, torch.where(finite, statistics * weight, 0.0)),
        ):
            sums[batch] = sums[batch] + value if batch in sums else value

    def average(self) -> Tensor:
        """Over the batches, (2, channels). NaN where no call counts."""
        return torch.stack([*self.sums.values()]).sum(0) / torch.stack([*self.weights.values()]).sum()

    def noise(self, average: Tensor, units: Tensor) -> Tensor:
        """The variance of the average, by the scatter of the batches, (2, channels). 0 for one batch, which does not say it.

        average, units: (2, channels), what it is about and in units of what.

        The statistics of a batch have a variance that is inverse to its weight.
        """
        weights = torch.stack([*self.weights.values()])
        means = torch.stack([*self.sums.values()]) / torch.where(weights == 0, 1, weights)[:, None, None]
        scatter = ((means - average) / units).square().mul(weights[:, None, None]).sum(0)
        return scatter / torch.where(weights.sum() == 0, 1, weights.sum() * (weights.count_nonzero() - 1).clamp_min(1))


class _BatchStatistics(TorchFunctionMode):
    """Inside, some batch norms in eval mode normalise by the batch; `samples` has its statistics, by the id of a running mean.

    `values` has the least number of values per channel that each norm got.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self.samples = {id(norm.running_mean): _Samples() for norm in norms}
        self.values: dict[int, int] = {}
        self._batch = 0  # its number

    def run(self, forwards: Iterable[object]) -> Self:
        """Run the network on one batch after the other, without gradients."""
        with torch.no_grad(), self:
            for _ in forwards:
                self._batch += 1
        return self

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        norm = id(args[1]) if func is F.batch_norm and len(args) > 2 else None
        if norm not in self.samples:
            return func(*args, **(kwargs or {}))
        values = args[0].numel() // args[0].shape[1]
        self.values[norm] = min(values, self.values.get(norm, values))
        if values == 1:
            return func(*args, **(kwargs or {}))
        result, statistics = _norm_by_batch(*args, **(kwargs or {}))
        self.samples[norm].add(statistics, values, self._batch)
        return result


def _norm_by_batch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """What F.batch_norm returns of these arguments in training, and the batch's mean and unbiased variance, (2, channels).

    torch's kernel has the two at once. All is computed at least in float32.
    """
    x = widen(input)
    statistics = x.new_zeros(2, x.shape[1])  # a momentum of 1 forgets them
    mean, variance = statistics
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
    return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps).to(input.dtype), statistics


def value_counts(norms: Sequence[_BatchNorm], forwards: Iterable[object]) -> list[int]:
    """The least number of values per channel that each batch norm normalises in these forwards; 0 where it is not called.

    norms, forwards: as in `recalibrated_norms`.
    """
    batches = _BatchStatistics(norms).run(forwards)
    return [batches.values.get(id(norm.running_mean), 0) for norm in norms]


def shrink(estimate: Tensor, noise: Tensor, towards: Tensor, units: Tensor) -> Tensor:
    """Draw noisy numbers towards others, as far as the two differ by no more than the noise (James & Stein 1961).

    estimate, towards: (n,).
    units: (n,); a deviation of a unit counts as much in each of the n numbers.
    noise: (n,), the variances of `estimate` in these units.

    With d² the sum of ((estimate − towards) / units)² and v the noise, the share of the way is min(1, (Σ v − 2 max v) / d²), or
    0 where that is negative. Where the noise is normal and v is known, the mean square error in these units is then below that
    of `estimate`, whatever `towards` is (Bock 1975, Minimax estimators of the mean of a multivariate normal distribution).
    """
    certain = (noise.sum() - 2 * noise.max()).clamp_min(0)
    distance = ((estimate - towards) / units).square().sum()
    share = certain / torch.maximum(distance, certain).clamp_min(torch.finfo(noise.dtype).tiny)
    return torch.where((distance + certain).isfinite(), torch.lerp(estimate, towards, share), estimate)


@dataclass(frozen=True)
class _Statistics:
    """What is known of the mean and the variance of each channel of a norm, each (2, channels).

    noise: of `sampled`, in units of the variance's root, and of the variance.
    """

    running: Tensor
    sampled: Tensor
    noise: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, samples: _Samples) -> _Statistics:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        running = widen(torch.stack([norm.running_mean, norm.running_var]))
        if not samples.weights:
            return cls(running, running.clone(), torch.zeros_like(running))
        sampled = samples.average()
        return cls(running, sampled, samples.noise(sampled, _units(running, sampled, norm.eps)))

    def estimates(self, eps: float) -> list[Tensor]:
        """[mean, variance] for an evaluation."""
        units = _units(self.running, self.sampled, eps)
        noise = self.noise / distributed.processes()
        return [shrink(*numbers) for numbers in zip(self.sampled, noise, self.running, units, strict=True)]


def _units(running: Tensor, sampled: Tensor, eps: float) -> Tensor:
    """In which deviations of the mean and of the variance of a channel count, (2, channels).

    The larger variance: a channel that is constant in a few batches has no say over the others.
    """
    known = torch.where(running[1].isfinite(), running[1], 0.0)
    variance = torch.maximum(known, sampled[1]) + eps
    return torch.stack([variance.sqrt(), variance])


@contextmanager
def recalibrated_norms(norms: Sequence[_BatchNorm], forwards: Iterable[object]) -> Iterator[None]:
    """Inside, batch norms have statistics of some batches. Several processes: of the batches of all.

    norms: with running statistics. A norm that no batch reaches keeps its own. Where there are none, nothing is run.
    forwards: an iterator that calls the network of the norms in eval mode on one batch at a time. All processes must have one.

    The averages that training keeps lag behind the weights, and are those of activations under dropout (Li et al. 2019,
    Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift). Statistics of some training batches
    in eval mode (Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, Sec. 3) belong to the network that is evaluated, and for
    which λ is chosen: the hyper step normalises by its batch. But where these have few values per channel they are noisy. So
    the statistics of each norm are drawn towards the running ones, as far as `shrink` says.
    """
    if not norms:
        yield
        return
    batches = _BatchStatistics(norms).run(forwards)
    known = [_Statistics.of(norm, batches.samples[id(norm.running_mean)]) for norm in norms]
    distributed.average(tensor for one in known for tensor in (one.running, one.sampled, one.noise))
    statistics = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
    with swapped_tensors(
        statistics, [t for norm, one in zip(norms, known, strict=True) for t in one.estimates(norm.eps)]
    ):
        yield
