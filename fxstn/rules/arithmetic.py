"""Elementwise operations of two or more tensors, their scalars and broadcasting included."""

from __future__ import annotations

import operator

import torch

from fxstn.layers.kernels import expand_like
from fxstn.rules.registry import additive, bilinear, pointwise, rule, total
from fxstn.tangents import ZERO

additive(operator.add)
additive(operator.sub)
bilinear(operator.mul)

pointwise(operator.truediv, lambda da, y, a, b: da / b, lambda db, y, a, b: -(y * db) / b)
pointwise(torch.hypot, lambda da, y, a, b: da * (a / y), lambda db, y, a, b: db * (b / y))
pointwise(torch.atan2, lambda da, y, a, b: da * (b / (a * a + b * b)), lambda db, y, a, b: db * (-a / (a * a + b * b)))
pointwise(torch.logaddexp, lambda da, y, a, b: da * torch.exp(a - y), lambda db, y, a, b: db * torch.exp(b - y))
pointwise(torch.logaddexp2, lambda da, y, a, b: da * torch.exp2(a - y), lambda db, y, a, b: db * torch.exp2(b - y))
pointwise(torch.remainder, lambda da, y, a, b: expand_like(da, y), lambda db, y, a, b: -db * torch.floor(a / b))
pointwise(torch.fmod, lambda da, y, a, b: expand_like(da, y), lambda db, y, a, b: -db * torch.trunc(a / b))
pointwise(torch.copysign, lambda da, y, a, b: da * (torch.sign(a) * torch.sign(y)))
pointwise(torch.xlogy, lambda da, y, a, b: torch.xlogy(da, b), lambda db, y, a, b: db * (a / b))
pointwise(
    torch.rsub,
    lambda da, y, a, b, alpha=1: expand_like(-alpha * da, y),
    lambda db, y, a, b, alpha=1: expand_like(db, y),
)
pointwise(
    torch.addcmul,
    lambda dx, y, x, a, b, value=1: expand_like(dx, y),
    lambda da, y, x, a, b, value=1: expand_like(value * da * b, y),
    lambda db, y, x, a, b, value=1: expand_like(value * a * db, y),
)
pointwise(
    torch.addcdiv,
    lambda dx, y, x, a, b, value=1: expand_like(dx, y),
    lambda da, y, x, a, b, value=1: expand_like(value * da / b, y),
    lambda db, y, x, a, b, value=1: expand_like(-value * a * db / (b * b), y),
)
pointwise(
    torch.lerp,
    lambda da, y, a, b, weight: expand_like(da * (1 - weight), y),
    lambda db, y, a, b, weight: expand_like(db * weight, y),
    lambda dw, y, a, b, weight: dw * (b - a),
)


def _register_extremum(function, better):
    """The tangent of the value chosen; half of each where they are equal, as torch has it."""
    pointwise(
        function,
        lambda da, y, a, b: torch.where(a == b, da / 2, da * better(a, b)),
        lambda db, y, a, b: torch.where(a == b, db / 2, db * better(b, a)),
    )


_register_extremum(torch.maximum, operator.gt)
_register_extremum(torch.minimum, operator.lt)
# fmax and fmin take the other value where one is NaN; equal values count as the first.
pointwise(torch.fmax, lambda da, y, a, b: da * ((a >= b) | torch.isnan(b)),
          lambda db, y, a, b: db * ~((a >= b) | torch.isnan(b)))  # fmt: skip
pointwise(torch.fmin, lambda da, y, a, b: da * ((a <= b) | torch.isnan(b)),
          lambda db, y, a, b: db * ~((a <= b) | torch.isnan(b)))  # fmt: skip
pointwise(torch.clamp_min, lambda dx, y, x, min: dx * (x >= min), lambda dmin, y, x, min: dmin * (x < min))
pointwise(torch.clamp_max, lambda dx, y, x, max: dx * (x <= max), lambda dmax, y, x, max: dmax * (x > max))


@rule(torch.clamp, kind="pointwise")
def clamp(d, input, min=None, max=None):
    y = torch.clamp(input, min, max)
    return y, total(
        (d.input, lambda dx: dx * (y == input)),
        (d.min, lambda dmin: dmin * ((input < min) if max is None else (input < min) & (min < max))),
        (d.max, lambda dmax: dmax * ((input > max) if min is None else (input > max) | (max < min))),
    )


@rule(torch.where)
def where(d, condition, input=None, other=None):
    if input is None:
        return torch.where(condition), ZERO
    y = torch.where(condition, input, other)
    if d.input is ZERO and d.other is ZERO:
        return y, ZERO
    dy = torch.where(condition, 0 if d.input is ZERO else d.input, 0 if d.other is ZERO else d.other)
    return y, expand_like(dy, y)


def _register_power(function):
    @rule(function, kind="pointwise")
    def power(d, input, exponent):
        y = function(input, exponent)
        if d.exponent is ZERO and isinstance(exponent, (int, float)):
            return y, d.input * (exponent * function(input, exponent - 1)) if exponent != 0 else ZERO
        slope = lambda: torch.where(exponent == 0, 0, exponent * function(input, exponent - 1))  # noqa: E731
        return y, total((d.input, lambda dx: dx * slope()), (d.exponent, lambda dn: dn * torch.xlogy(y, input)))


_register_power(operator.pow)
_register_power(torch.float_power)
