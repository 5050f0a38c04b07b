"""The original forward as a function of its weights alone, for differences: what autograd takes for constant is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.live.following import Call, Following, Sites
from fxstn.live.structure import arguments_mapped


class Witness(Following):
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
        result = call.run()
        constant = self.disabled() or call.function is torch.detach
        return arguments_mapped(self._held, result) if constant else result

    def _held(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self.constants is None:
            self.kept.append(x.clone())
            return x
        return x.copy_(next(self.constants)) if self.disabled() else next(self.constants).clone()

    def run_constant(self, inputs: tuple) -> Any:
        """The output, with grad mode on as in training; the model's parameters should not require gradients."""
        with torch.enable_grad():
            return self.run(inputs, {})
