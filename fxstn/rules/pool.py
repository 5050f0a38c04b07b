"""Pooling. By average: linear. By maximum: the tangent is picked by the indices that the primal chose."""

from __future__ import annotations

import math
import operator

import torch.nn.functional as F

from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import pick
from fxstn.ops.reductions import or_infinity
from fxstn.rules.fallback import fallback
from fxstn.rules.registry import linear, rule

linear(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, fresh=True)
linear(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, fresh=True)
linear(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d, fresh=True)


def _register_max_pool(function, with_indices, spatial):
    @rule(function, fresh=True)
    def max_pool(d, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        results = with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
        return _picked(d.input, results, spatial, return_indices)


def _register_adaptive_max_pool(function, with_indices, spatial):
    @rule(function, fresh=True)
    def adaptive_max_pool(d, input, output_size, return_indices=False):
        return _picked(d.input, with_indices(input, output_size), spatial, return_indices)


def _register_fractional_max_pool(function, with_indices, spatial):
    @rule(function, random=True, fresh=True)
    def fractional_max_pool(
        d, input, kernel_size, output_size=None, output_ratio=None, return_indices=False, _random_samples=None
    ):
        """The regions are drawn once: the tangent is picked where the primal was."""
        results = with_indices(input, kernel_size, output_size, output_ratio, _random_samples=_random_samples)
        return _picked(d.input, results, spatial, return_indices)


def _picked(dx, results, spatial, return_indices):
    y, indices = operator.getitem(results, 0), operator.getitem(results, 1)
    dy = pick(dx, indices, spatial)
    return (results, (dy, ZERO)) if return_indices else (y, dy)


for spatial in (1, 2, 3):
    name = f"max_pool{spatial}d"
    _register_max_pool(getattr(F, name), getattr(F, f"{name}_with_indices"), spatial)
    _register_adaptive_max_pool(getattr(F, f"adaptive_{name}"), getattr(F, f"adaptive_{name}_with_indices"), spatial)
for spatial in (2, 3):
    name = f"fractional_max_pool{spatial}d"
    _register_fractional_max_pool(getattr(F, name), getattr(F, f"{name}_with_indices"), spatial)


def _register_power_pool(function, spatial):
    """lp_pool: (Σ x^p)^(1/p) over windows, of x^p as torch writes it: signed where p is odd."""
    average = getattr(F, f"avg_pool{spatial}d")

    @rule(function, fresh=True)
    def power_pool(d, input, norm_type, kernel_size, stride=None, ceil_mode=False):
        if math.isinf(norm_type):
            return fallback(function, (d.input,), (input, norm_type, kernel_size, stride, ceil_mode), {})
        y = function(input, norm_type, kernel_size, stride, ceil_mode)
        pooled = lambda v: average(v, kernel_size, stride, 0, ceil_mode)  # noqa: E731
        size = kernel_size**spatial if isinstance(kernel_size, int) else math.prod(kernel_size)
        change = pooled(input ** (norm_type - 1) * d.input) * size
        return y, change / or_infinity(y ** (norm_type - 1))


for spatial in (1, 2, 3):
    _register_power_pool(getattr(F, f"lp_pool{spatial}d"), spatial)
