"""Context managers that change a network and restore it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fxstn.bilevel import distributed
from fxstn.bilevel.state import GlobalRandomState, State
from fxstn.network import SelfTuningNetwork
from fxstn.ops.precision import wide, widen


@contextmanager
def swapped_tensors(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the tensors, and every graph that shares them, have these values."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        _fill(tensors, values)
        yield
    finally:
        _fill(tensors, before)


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def training_tensors(module: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of what training changes: parameters that are trained, and buffers."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return trained | dict(module.named_buffers())


@contextmanager
def trained_apart(stn: SelfTuningNetwork) -> Iterator[None]:
    """Inside, a network may be trained at other values of λ; afterwards all is as before: weights, gradients, λ, modes, random
    generators.

    Weights wait in main memory. A network of method "stn" is one of method "centered" inside: its weights do not move with λ.
    """
    tensors = [*training_tensors(stn.model).values(), stn.hparams.unconstrained]
    before = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in stn.parameters()]
    modes = [(module, module.training) for module in stn.modules()]
    method, random = stn.method, GlobalRandomState.current()
    try:
        stn.method = "centered" if method == "stn" else method
        stn.zero_grad()
        yield
    finally:
        stn.method = method
        _fill(tensors, before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        random.set()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode, and no gradients are recorded."""
    with in_eval_mode(module), torch.no_grad():
        yield


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode. Nothing is done where it is already: a pass over a loader switches once."""
    if not any(own.training for own in module.modules()):
        yield
        return
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class WeightAverages:
    """Exponential moving averages of the floating-point tensors among some: a ← decay a + (1 − decay) x. At least float32."""

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._live = [t for t in tensors if t.is_floating_point()]
        self.averages = [t.detach().to(wide(t.dtype), copy=True) for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Count the tensors as they are now."""
        torch._foreach_lerp_(self.averages, [widen(t.detach()) for t in self._live], 1 - self.decay)

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


@dataclass
class _Sums:
    """Sums over batches of the mean and the unbiased variance of each channel, and the number of these batches."""

    batches: Tensor | float = 0.0
    mean: Tensor | float = 0.0
    variance: Tensor | float = 0.0


class _BatchStatistics(TorchFunctionMode):
    """Inside, some batch norms in eval mode normalise by the batch; `sums` adds up its statistics.

    `values` has the least number of values per channel that each norm got, by the id of its running mean.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self.sums = {id(norm.running_mean): _Sums() for norm in norms}
        self.values: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        ours = func is F.batch_norm and len(args) > 2 and id(args[1]) in self.sums
        values = args[0].numel() // args[0].shape[1] if ours else 0
        if ours:
            self.values[id(args[1])] = min(values, self.values.get(id(args[1]), values))
        if values > 1:
            mean, variance = self._count(args[0].detach(), self.sums[id(args[1])])
            args = (args[0], mean.to(args[1].dtype), variance.to(args[2].dtype), *args[3:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _count(x: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
        values = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(widen(x), [0, *range(2, x.dim())], correction=0)
        counts = torch.isfinite(mean).all() & torch.isfinite(variance).all()  # not one that overflows in float16
        sums.batches = sums.batches + counts.to(mean.dtype)
        sums.mean = sums.mean + torch.where(counts, mean, 0.0)
        sums.variance = sums.variance + torch.where(counts, variance * values / (values - 1), 0.0)
        return mean, variance


def value_counts(norms: Sequence[_BatchNorm], run: Callable[[], None]) -> list[int]:
    """The least number of values per channel that each batch norm normalises in `run`; 0 where it is not called.

    norms, run: as in `recalibrated_norms`.
    """
    with torch.no_grad(), _BatchStatistics(norms) as batches:
        run()
    return [batches.values.get(id(norm.running_mean), 0) for norm in norms]


@contextmanager
def recalibrated_norms(norms: Sequence[_BatchNorm], run: Callable[[], None]) -> Iterator[None]:
    """Inside, batch norms have the mean statistics of the batches of `run`. Several processes: the mean over them.

    norms: with running statistics. A norm that no batch reaches keeps its own.
    run: calls the network of the norms in eval mode on some batches. All processes must call it.

    The averages that training keeps lag behind the weights, and are those of activations under dropout (Li et al. 2019,
    Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift). Statistics of some training batches
    in eval mode (Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, Sec. 3) belong to the network that is evaluated, and for
    which λ is chosen: the hyper step normalises by its batch.
    """
    with torch.no_grad(), _BatchStatistics(norms) as batches:
        run()
    statistics, estimates = [], []
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        sums = batches.sums[id(norm.running_mean)]
        for tensor, total in ((norm.running_mean, sums.mean), (norm.running_var, sums.variance)):
            statistics.append(tensor)
            estimates.append(total / sums.batches if isinstance(total, Tensor) else widen(tensor).clone())
    distributed.average(estimates)
    with swapped_tensors(statistics, estimates):
        yield
