"""Elementwise operations of two or more tensors, their scalars and broadcasting included."""

from __future__ import annotations

import operator

import torch

from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import expand_like
from fxstn.rules.registry import additive, bilinear, pointwise, rule, total

additive(operator.add)
additive(operator.sub)
bilinear(operator.mul, elementwise=True)

pointwise(operator.truediv, lambda da, y, input, other: da / other, lambda db, y, input, other: -(y * db) / other)
pointwise(torch.hypot, lambda da, y, input, other: da * (input / y), lambda db, y, input, other: db * (other / y))
pointwise(
    torch.atan2,
    lambda da, y, input, other: da * (other / (input * input + other * other)),
    lambda db, y, input, other: db * (-input / (input * input + other * other)),
)
pointwise(
    torch.logaddexp,
    lambda da, y, input, other: da * torch.exp(input - y),
    lambda db, y, input, other: db * torch.exp(other - y),
)
pointwise(
    torch.logaddexp2,
    lambda da, y, input, other: da * torch.exp2(input - y),
    lambda db, y, input, other: db * torch.exp2(other - y),
)
pointwise(
    torch.remainder,
    lambda da, y, input, other: expand_like(da, y),
    lambda db, y, input, other: -db * torch.floor(input / other),
)
pointwise(
    torch.fmod,
    lambda da, y, input, other: expand_like(da, y),
    lambda db, y, input, other: -db * torch.trunc(input / other),
)
pointwise(torch.copysign, lambda da, y, input, other: da * (torch.sign(input) * torch.sign(y)))
pointwise(
    torch.xlogy,
    lambda da, y, input, other: torch.where((input == 0) & (other <= 0), 0, torch.xlogy(da, other)),
    lambda db, y, input, other: db * (input / other),
)
pointwise(
    torch.rsub,
    lambda da, y, input, other, alpha=1: expand_like(-alpha * da, y),
    lambda db, y, input, other, alpha=1: expand_like(db, y),
)
pointwise(
    torch.addcmul,
    lambda dx, y, input, tensor1, tensor2, value=1: expand_like(dx, y),
    lambda da, y, input, tensor1, tensor2, value=1: expand_like(value * da * tensor2, y),
    lambda db, y, input, tensor1, tensor2, value=1: expand_like(value * tensor1 * db, y),
)
pointwise(
    torch.addcdiv,
    lambda dx, y, input, tensor1, tensor2, value=1: expand_like(dx, y),
    lambda da, y, input, tensor1, tensor2, value=1: expand_like(value * da / tensor2, y),
    lambda db, y, input, tensor1, tensor2, value=1: expand_like(-value * tensor1 * db / (tensor2 * tensor2), y),
)
pointwise(
    torch.lerp,
    lambda da, y, input, end, weight: expand_like(da * (1 - weight), y),
    lambda db, y, input, end, weight: expand_like(db * weight, y),
    lambda dw, y, input, end, weight: dw * (end - input),
)


def _register_extremum(function, better):
    """The tangent of the value chosen; half of each where they are equal, as torch has it."""
    pointwise(
        function,
        lambda da, y, input, other: torch.where(input == other, da / 2, da * better(input, other)),
        lambda db, y, input, other: torch.where(input == other, db / 2, db * better(other, input)),
    )


_register_extremum(torch.maximum, operator.gt)
_register_extremum(torch.minimum, operator.lt)
# fmax and fmin take the other value where one is NaN; equal values count as the first.
pointwise(torch.fmax, lambda da, y, input, other: da * ((input >= other) | torch.isnan(other)),
          lambda db, y, input, other: db * ~((input >= other) | torch.isnan(other)))  # fmt: skip
pointwise(torch.fmin, lambda da, y, input, other: da * ((input <= other) | torch.isnan(other)),
          lambda db, y, input, other: db * ~((input <= other) | torch.isnan(other)))  # fmt: skip
pointwise(torch.clamp_min, lambda dx, y, x, min: dx * (x >= min), lambda dmin, y, x, min: dmin * (x < min))
pointwise(torch.clamp_max, lambda dx, y, x, max: dx * (x <= max), lambda dmax, y, x, max: dmax * (x > max))


@rule(torch.clamp, kind="pointwise", fresh=True)
def clamp(d, input, min=None, max=None):
    y = torch.clamp(input, min, max)
    return y, total(
        (d.input, lambda dx: dx * (y == input)),
        (d.min, lambda dmin: dmin * ((input < min) if max is None else (input < min) & (min < max))),
        (d.max, lambda dmax: dmax * ((input > max) if min is None else (input > max) | (max < min))),
    )


@rule(torch.where, fresh=True)
def where(d, condition, input=None, other=None):
    if input is None:
        return torch.where(condition), ZERO
    y = torch.where(condition, input, other)
    if d.input is ZERO and d.other is ZERO:
        return y, ZERO
    dy = torch.where(condition, 0 if d.input is ZERO else d.input, 0 if d.other is ZERO else d.other)
    return y, expand_like(dy, y)


def _register_power(function):
    @rule(function, kind="pointwise", fresh=True)
    def power(d, input, exponent):
        y = function(input, exponent)
        if d.exponent is ZERO and isinstance(exponent, (int, float)):
            return y, d.input * (exponent * function(input, exponent - 1)) if exponent != 0 else ZERO
        slope = lambda: torch.where(exponent == 0, 0, exponent * function(input, exponent - 1))  # noqa: E731
        return y, total((d.input, lambda dx: dx * slope()), (d.exponent, lambda dn: dn * torch.xlogy(y, input)))


_register_power(operator.pow)
_register_power(torch.float_power)
