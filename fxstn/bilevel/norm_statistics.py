"""Statistics of batch norms for an evaluation: those of some batches, drawn towards the running ones where they are noisy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fxstn.bilevel import distributed
from fxstn.bilevel.temporary import swapped_tensors
from fxstn.ops.precision import widen


class _Samples:
    """Mean and unbiased variance of each channel in some batches. A batch that overflows counts for nothing."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []  # 1. for each batch that counts, 0. for others; the host does not wait to know
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def add(self, mean: Tensor, variance: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(variance).all()
        self.counts.append(finite.to(mean.dtype))
        self.means.append(torch.where(finite, mean, 0.0))
        self.variances.append(torch.where(finite, variance, 0.0))

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """(average over the batches, its variance by their scatter), of the mean and of the variance of each channel.

        The scatter of a single batch is not known, and 0. Where no batch counts, the averages are NaN.
        """
        counts = torch.stack(self.counts)
        number, result = counts.sum(), []
        for values in (torch.stack(self.means), torch.stack(self.variances)):
            average = values.sum(0) / number
            scatter = (values - average).square().mul(counts[:, None]).sum(0)
            result.append((average, scatter / (number * (number - 1)).clamp_min(1)))
        return result


class _BatchStatistics(TorchFunctionMode):
    """Inside, some batch norms in eval mode normalise by the batch; `samples` has its statistics, by the id of a running mean.

    `values` has the least number of values per channel that each norm got.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self.samples = {id(norm.running_mean): _Samples() for norm in norms}
        self.values: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        ours = func is F.batch_norm and len(args) > 2 and id(args[1]) in self.samples
        values = args[0].numel() // args[0].shape[1] if ours else 0
        if ours:
            self.values[id(args[1])] = min(values, self.values.get(id(args[1]), values))
        if values > 1:
            x = args[0].detach()
            variance, mean = torch.var_mean(widen(x), [0, *range(2, x.dim())], correction=0)
            self.samples[id(args[1])].add(mean, variance * values / (values - 1))
            args = (args[0], mean.to(args[1].dtype), variance.to(args[2].dtype), *args[3:])
        return func(*args, **(kwargs or {}))


def value_counts(norms: Sequence[_BatchNorm], run: Callable[[], None]) -> list[int]:
    """The least number of values per channel that each batch norm normalises in `run`; 0 where it is not called.

    norms, run: as in `recalibrated_norms`.
    """
    with torch.no_grad(), _BatchStatistics(norms) as batches:
        run()
    return [batches.values.get(id(norm.running_mean), 0) for norm in norms]


def shrunk(estimate: Tensor, variance: Tensor, towards: Tensor, unit: Tensor) -> Tensor:
    """Noisy numbers, drawn towards others as far as the two differ by no more than the noise (James & Stein 1961).

    estimate, towards, unit: (n,); a deviation of `unit` counts as much in each of the n numbers.
    variance: (n,), of `estimate`.

    With d the mean square of (estimate − towards) / unit and v the mean of variance / unit², the share of the way is
    min(1, (1 − 2/n) v/d). For normal noise of a known variance and n ≥ 3 the mean square error is below that of `estimate`,
    whatever `towards` is.
    """
    noise = (variance / unit.square()).mean() * max(0.0, 1 - 2 / len(estimate))
    distance = ((estimate - towards) / unit).square().mean()
    share = noise / torch.maximum(distance, noise).clamp_min(torch.finfo(noise.dtype).tiny)
    return torch.where(distance.isfinite(), torch.lerp(estimate, towards, share), estimate)


@dataclass(frozen=True)
class _Known:
    """What is known of one statistic of a norm: the running one, that of the batches, and the variance of this."""

    running: Tensor
    sampled: Tensor
    variance: Tensor

    def estimate(self, unit: Tensor) -> Tensor:
        """The one for an evaluation. unit: as in `shrunk`."""
        return shrunk(self.sampled, self.variance / distributed.processes(), self.running, unit)


def _known(running: Sequence[Tensor], samples: _Samples) -> list[_Known]:
    """Of the mean and of the variance of a norm."""
    own = [widen(tensor).clone() for tensor in running]
    pairs = samples.averages() if samples.counts else [(tensor.clone(), torch.zeros_like(tensor)) for tensor in own]
    return [_Known(before, *pair) for before, pair in zip(own, pairs, strict=True)]


@contextmanager
def recalibrated_norms(norms: Sequence[_BatchNorm], run: Callable[[], None]) -> Iterator[None]:
    """Inside, batch norms have statistics of the batches of `run`. Several processes: of the batches of all.

    norms: with running statistics. A norm that no batch reaches keeps its own. Where there are none, nothing is run.
    run: calls the network of the norms in eval mode on some batches. All processes must call it.

    The averages that training keeps lag behind the weights, and are those of activations under dropout (Li et al. 2019,
    Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift). Statistics of some training batches
    in eval mode (Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, Sec. 3) belong to the network that is evaluated, and for
    which λ is chosen: the hyper step normalises by its batch. But where these have few values per channel they are noisy. So
    the statistics of each norm are drawn towards the running ones, as far as `shrunk` says.
    """
    if not norms:
        yield
        return
    with torch.no_grad(), _BatchStatistics(norms) as batches:
        run()
    running = [[t for t in (norm.running_mean, norm.running_var) if t is not None] for norm in norms]
    known = [_known(pair, batches.samples[id(pair[0])]) for pair in running]
    distributed.average(t for one in itertools.chain(*known) for t in (one.running, one.sampled, one.variance))
    estimates = []
    for norm, (mean, variance) in zip(norms, known, strict=True):
        unit = variance.sampled + norm.eps
        estimates += [mean.estimate(unit.sqrt()), variance.estimate(unit)]
    with swapped_tensors(list(itertools.chain(*running)), estimates):
        yield
