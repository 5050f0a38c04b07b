"""Max pooling: the tangent is picked by the indices that the primal chose."""

from __future__ import annotations

import operator

import torch.nn.functional as F

from fxstn.layers.kernels import pick
from fxstn.rules.registry import rule
from fxstn.tangents import ZERO


def _register_max_pool(function, with_indices, spatial):
    @rule(function)
    def max_pool(d, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        results = with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
        y, indices = operator.getitem(results, 0), operator.getitem(results, 1)
        dy = pick(d.input, indices, spatial)
        return (results, (dy, ZERO)) if return_indices else (y, dy)


def _register_adaptive_max_pool(function, with_indices, spatial):
    @rule(function)
    def adaptive_max_pool(d, input, output_size, return_indices=False):
        results = with_indices(input, output_size)
        y, indices = operator.getitem(results, 0), operator.getitem(results, 1)
        dy = pick(d.input, indices, spatial)
        return (results, (dy, ZERO)) if return_indices else (y, dy)


for spatial in (1, 2, 3):
    name = f"max_pool{spatial}d"
    _register_max_pool(getattr(F, name), getattr(F, f"{name}_with_indices"), spatial)
    _register_adaptive_max_pool(getattr(F, f"adaptive_{name}"), getattr(F, f"adaptive_{name}_with_indices"), spatial)
