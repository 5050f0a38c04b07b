"""Context managers that change a network and restore it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from fxstn.bilevel.state import State
from fxstn.ir.generators import GlobalRandomState
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
