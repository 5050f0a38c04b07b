"""Statistics of batch norms as an evaluation needs them: of the weights as they are now, without dropout and augmentation.

The averages that training keeps lag behind the weights, and are those of activations under dropout (Li et al. 2019,
Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift). Estimated anew on some training batches
in eval mode (Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, Sec. 3) they belong to the network that is evaluated, and for
which λ is chosen: the hyper step normalises by its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fxstn.bilevel import distributed
from fxstn.bilevel.lending import lent


class _ByBatch(TorchFunctionMode):
    """These norms, in eval mode, normalise by the batch; what they see is added up."""

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self.sums: dict[int, list[Any]] = {id(norm.running_mean): [0, 0.0, 0.0] for norm in norms}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        ours = func is F.batch_norm and len(args) > 2 and id(args[1]) in self.sums
        if ours and args[0].numel() > args[0].shape[1]:  # more than one value per channel
            mean, variance = self._count(args[0].detach(), self.sums[id(args[1])])
            args = (args[0], mean.to(args[1].dtype), variance.to(args[2].dtype), *args[3:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _count(x: Tensor, sums: list[Any]) -> tuple[Tensor, Tensor]:
        values = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.float(), [0, *range(2, x.dim())], correction=0)
        sums[:] = sums[0] + 1, sums[1] + mean, sums[2] + variance * values / (values - 1)
        return mean, variance


@contextmanager
def recalibrated(norms: Sequence[_BatchNorm], run: Callable[[], None]) -> Iterator[None]:
    """While this lasts, the norms have the mean statistics of what they see in `run`, which calls their network in eval mode
    on some batches. Norms that see nothing keep theirs. Several processes: the mean over them; all must call it."""
    statistics: list[Any] = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    with torch.no_grad(), _ByBatch(norms) as counted:
        run()
    sums = [(total, count) for count, *totals in counted.sums.values() for total in totals]
    estimates = [total / count if count else t for t, (total, count) in zip(statistics, sums, strict=True)]
    with lent(statistics, estimates):
        distributed.average(statistics)
        yield
