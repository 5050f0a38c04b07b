"""Regularisers that drop parts of the network: whole examples of a branch, single weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxstn.hp.operation import Operation
from fxstn.hp.specs import Number, Spec
from fxstn.layers.noise import by_example, uniform


class StochasticDepth(Operation):
    """Probability, in [0, 0.95], that an example skips a residual branch (Huang et al. 2016, arXiv 1603.09382).

    Takes over `torchvision.ops.StochasticDepth` by row; inserts nothing.
    """

    numbers: Mapping[str, Number] = {"stochastic_depth": Number(0.05, 0, 0.95)}
    inserts = False
    apply = operator.mul

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        return {"stochastic_depth": module.p}, {}

    @staticmethod
    def draw(x: Tensor, p: Tensor | float) -> Tensor:
        p = by_example(p, x)
        return ((uniform(x) >= p) / (1 - p)).to(x.dtype)


class DropConnect(Spec):
    """Probability, in [0, 0.95], that a weight is dropped (Wan et al. 2013): one mask for the whole batch, and so one
    perturbation, on the weights (no biases, no norms) of the matched linear and convolution layers."""

    numbers: Mapping[str, Number] = {"drop_connect": Number(0.05, 0, 0.95, by_batch=True)}
