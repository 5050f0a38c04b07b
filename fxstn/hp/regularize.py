"""Regularisers that drop parts of the network: whole examples of a branch, single weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxstn.hp.operation import Operation
from fxstn.hp.specs import Number, Spec
from fxstn.layers.noise import by_example


class StochasticDepth(Operation):
    """Probability, in [0, 0.95], that an example skips a residual branch (Huang et al. 2016, arXiv 1603.09382).

    Takes over `torchvision.ops.StochasticDepth`; inserts nothing.
    """

    numbers: Mapping[str, Number] = {"stochastic_depth": Number(0.05, 0, 0.95)}
    defaults: Mapping[str, Any] = {"mode": "row"}
    inserts = False
    apply = operator.mul

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        return {"stochastic_depth": module.p}, {"mode": module.mode}

    @staticmethod
    def draw(x: Tensor, p: Tensor | float, mode: str = "row") -> Tensor:
        p = by_example(p, x)
        rows = 1 if mode == "batch" else x.shape[0]
        noise = torch.rand(rows, *[1] * (x.dim() - 1), device=x.device, dtype=p.dtype)
        p = p[:rows] if mode == "batch" else p
        return ((noise >= p) / (1 - p)).to(x.dtype)


class DropConnect(Spec):
    """Probability, in [0, 0.95], that a weight is dropped (Wan et al. 2013): one mask for the whole batch, and so one
    perturbation, on the weights (no biases, no norms) of the matched linear and convolution layers."""

    numbers: Mapping[str, Number] = {"drop_connect": Number(0.05, 0, 0.95, by_batch=True)}
