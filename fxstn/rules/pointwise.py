"""Elementwise functions of one tensor: dy = f'(x) dx. Conversions of type and casts."""

from __future__ import annotations

import math
import operator

import torch

from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import abs_tangent, cast_tangent
from fxstn.rules.registry import linear, pointwise, rule

Tensor = torch.Tensor

linear(operator.neg, operator.pos, torch.positive, torch.clone, Tensor.contiguous)
linear(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.cpu, Tensor.cuda)
linear(torch.deg2rad, torch.rad2deg)


@rule(Tensor.to)
def to(d, input, *target, **settings):
    y = input.to(*target, **settings)
    if d.input is ZERO:  # what varies only names a type
        return y, ZERO
    types = [value for value in (*target, settings.get("dtype")) if isinstance(value, torch.dtype)]
    if any(not (kind.is_floating_point or kind.is_complex) for kind in types):
        return y, ZERO
    other = settings.get("other", target[0] if target else None)
    known = types or other is None or isinstance(other, (str, torch.device))
    return y, d.input.to(*target, **settings) if known else cast_tangent(d.input, y)


@rule(Tensor.type)
def type_(d, input, dtype):
    y = input.type(dtype)
    return y, cast_tangent(d.input, y)


@rule(Tensor.type_as)
def type_as(d, input, other):
    y = input.type_as(other)
    return y, ZERO if d.input is ZERO else cast_tangent(d.input, y)


pointwise(torch.nan_to_num, lambda dx, y, x, *_, **__: torch.where(torch.isfinite(x), dx, 0))
pointwise(torch.exp, lambda dx, y, x: dx * y)
pointwise(torch.exp2, lambda dx, y, x: dx * (y * math.log(2)))
pointwise(torch.expm1, lambda dx, y, x: dx * (y + 1))
pointwise(torch.log, lambda dx, y, x: dx / x)
pointwise(torch.log1p, lambda dx, y, x: dx / (x + 1))
pointwise(torch.log2, lambda dx, y, x: dx / (x * math.log(2)))
pointwise(torch.log10, lambda dx, y, x: dx / (x * math.log(10)))
pointwise(torch.sqrt, lambda dx, y, x: dx / (2 * y))
pointwise(torch.rsqrt, lambda dx, y, x: dx * (-0.5 * y * y * y))
pointwise(torch.square, lambda dx, y, x: dx * (2 * x))
pointwise(torch.reciprocal, lambda dx, y, x: -dx * (y * y))
pointwise(torch.abs, lambda dx, y, x: abs_tangent(dx, x))
pointwise(torch.frac, lambda dx, y, x: +dx)
pointwise(torch.sin, lambda dx, y, x: dx * torch.cos(x))
pointwise(torch.cos, lambda dx, y, x: -dx * torch.sin(x))
pointwise(torch.tan, lambda dx, y, x: dx * (1 + y * y))
pointwise(torch.asin, lambda dx, y, x: dx * torch.rsqrt(1 - x * x))
pointwise(torch.acos, lambda dx, y, x: -dx * torch.rsqrt(1 - x * x))
pointwise(torch.atan, lambda dx, y, x: dx / (1 + x * x))
pointwise(torch.sinh, lambda dx, y, x: dx * torch.cosh(x))
pointwise(torch.cosh, lambda dx, y, x: dx * torch.sinh(x))
pointwise(torch.asinh, lambda dx, y, x: dx * torch.rsqrt(x * x + 1))
pointwise(torch.acosh, lambda dx, y, x: dx * torch.rsqrt(x * x - 1), real=True)  # rsqrt has another branch cut
pointwise(torch.atanh, lambda dx, y, x: dx / (1 - x * x))
pointwise(torch.erf, lambda dx, y, x: dx * (2 / math.sqrt(math.pi) * torch.exp(-x * x)))
pointwise(torch.erfc, lambda dx, y, x: dx * (-2 / math.sqrt(math.pi) * torch.exp(-x * x)))
pointwise(torch.erfinv, lambda dx, y, x: dx * (math.sqrt(math.pi) / 2 * torch.exp(y * y)))
pointwise(torch.lgamma, lambda dx, y, x: dx * torch.digamma(x))
pointwise(torch.digamma, lambda dx, y, x: dx * torch.polygamma(1, x))
pointwise(torch.sinc, lambda dx, y, x: dx * torch.where(x == 0, 0, (torch.cos(math.pi * x) - y) / x))
pointwise(torch.logit, lambda dx, y, x, eps=None: dx * _logit_slope(x, eps))


def _logit_slope(x, eps):
    slope = 1 / (x * (1 - x))
    return slope if eps is None else torch.where((x >= eps) & (x <= 1 - eps), slope, 0)
