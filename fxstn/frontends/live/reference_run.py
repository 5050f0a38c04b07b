"""The original forward as a function of its weights alone, for differences: what autograd takes for constant is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxstn.frontends.live.constant_guard import mutated
from fxstn.frontends.live.containers import arguments_mapped
from fxstn.frontends.live.tracer import Call, Following, Sites


class Float64Mode(TorchFunctionMode):
    """Operations asked for float32 keep float64: differences need its digits, and some models ask for it everywhere."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        function = Tensor.double if function is Tensor.float else function
        return function(*_widened(args), **_widened(kwargs or {}))


def _widened(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    if isinstance(value, dict):
        return {key: _widened(entry) for key, entry in value.items()}
    return torch.float64 if value is torch.float32 else value


class ReferenceRun(Following):
    """Knows no tangent and no rule. Results of detach and of no_grad regions keep the values that they had in the first run.

    constants: those values, in order; None in the first run, which collects them in `kept`.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, strengths: Tensor | None, constants: Sequence[Tensor] | None
    ) -> None:
        super().__init__(model, sites, strengths)
        self.kept: list[Tensor] = []
        self.constants: Iterator[Tensor] | None = None if constants is None else iter(constants)

    def apply(self, call: Call) -> Any:
        changed, result = mutated(call), call.run()
        if not (self.disabled() or call.function is torch.detach):
            return result
        held = arguments_mapped(self._held, result)
        for x in changed:  # in a region without gradients
            if x is result:
                x.copy_(held)
                return x
        return held

    def _held(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self.constants is None:
            self.kept.append(x.clone())
            return x
        value = next(self.constants)
        return (
            x if torch.equal(x, value) else value.clone()
        )  # x itself where it may: what is written into it is seen elsewhere

    def run_constant(self, inputs: tuple) -> Any:
        """The output, with grad mode on as in training; the model's parameters should not require gradients."""
        with torch.enable_grad():
            return self.run(inputs, {})
