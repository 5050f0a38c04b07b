"""Elementwise operations of two or more tensors, their scalars and broadcasting included."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import change_by_exponent, expand_like
from fxstn.ops.reductions import or_infinity
from fxstn.rules.registry import additive, bilinear, pointwise, rule, total

additive(operator.add)
additive(operator.sub)
bilinear(operator.mul, elementwise=True)

pointwise(operator.truediv, lambda da, y, input, other: da / other, lambda db, y, input, other: -(y * db) / other)
pointwise(torch.hypot, lambda da, y, input, other: da * (input / y), lambda db, y, input, other: db * (other / y))
pointwise(
    torch.atan2,
    lambda da, y, input, other: da * (other / or_infinity(input * input + other * other)),
    lambda db, y, input, other: db * (-input / or_infinity(input * input + other * other)),
)
pointwise(
    torch.logaddexp,
    lambda da, y, input, other: da * torch.sigmoid(input - other),
    lambda db, y, input, other: db * torch.sigmoid(other - input),
)
pointwise(
    torch.logaddexp2,
    lambda da, y, input, other: da * torch.sigmoid(math.log(2) * (input - other)),
    lambda db, y, input, other: db * torch.sigmoid(math.log(2) * (other - input)),
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


def _of_ties(function):
    """What the first of two equal values has of the tangent. torch before 2.14 has other conventions."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        return torch.autograd.grad(function(x), x)[0].item()


def _register_extremum(function, better):
    """The tangent of the value chosen, shared where they are equal."""
    share = _of_ties(lambda x: function(x, torch.zeros_like(x)))
    pointwise(
        function,
        lambda da, y, input, other: torch.where(input == other, share * da, da * better(input, other)),
        lambda db, y, input, other: torch.where(input == other, (1 - share) * db, db * better(other, input)),
    )


_register_extremum(torch.maximum, operator.gt)
_register_extremum(torch.minimum, operator.lt)
# fmax and fmin take the other value where one is NaN
_register_extremum(torch.fmax, lambda a, b: (a > b) | torch.isnan(b))
_register_extremum(torch.fmin, lambda a, b: (a < b) | torch.isnan(b))

# Of a value at its bound: whether it counts as inside of numbers, and its share where the bound is a tensor.
AT_NUMBER, AT_TENSOR = _of_ties(lambda x: torch.clamp(x, max=0)), _of_ties(lambda x: torch.clamp(x, max=x.detach()))


def _within(input: Any, min: Any, max: Any, equal: bool) -> Any:
    """Whether a value is between the bounds that are not None. equal: whether it may be equal to one."""
    above, below = (operator.ge, operator.le) if equal else (operator.gt, operator.lt)
    low = True if min is None else above(input, min)
    return low if max is None else low & below(input, max)


def _clamped(d: Any, input: Any, min: Any, max: Any) -> Any:
    """dy of torch.clamp(input, min, max), where one bound at least is not None."""
    if all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
        return d.input * _within(input, min, max, bool(AT_NUMBER))
    apart, crossed = (True, False) if min is None or max is None else (min < max, max < min)
    at_min: Any
    at_max: Any
    at_min, at_max = (False if bound is None else (input == bound) & apart for bound in (min, max))
    inside = _within(input, min, max, True)
    below = False if min is None else (input < min) & (crossed == False)  # noqa: E712 (of tensors, too)
    above = False if max is None else (input > max) | crossed
    return total(
        (d.input, lambda dx: torch.where(at_min | at_max, AT_TENSOR * dx, dx * inside)),
        (d.min, lambda dmin: torch.where(at_min, (1 - AT_TENSOR) * dmin, dmin * below)),
        (d.max, lambda dmax: torch.where(at_max, (1 - AT_TENSOR) * dmax, dmax * above)),
    )


@rule(torch.clamp, kind="pointwise", fresh=True)
def clamp(d, input, min=None, max=None):
    return torch.clamp(input, min, max), _clamped(d, input, min, max)


@rule(torch.clamp_min, kind="pointwise", fresh=True)
def clamp_min(d, input, min):
    d.max = ZERO
    return torch.clamp_min(input, min), _clamped(d, input, min, None)


@rule(torch.clamp_max, kind="pointwise", fresh=True)
def clamp_max(d, input, max):
    d.min = ZERO
    return torch.clamp_max(input, max), _clamped(d, input, None, max)


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
        if d.exponent is ZERO and isinstance(exponent, (int, float, complex)):
            return y, d.input * (exponent * function(input, exponent - 1)) if exponent != 0 else ZERO
        slope = lambda: torch.where(exponent == 0, 0, exponent * function(input, exponent - 1))  # noqa: E731
        return y, total(
            (d.input, lambda dx: dx * slope()), (d.exponent, lambda dn: change_by_exponent(dn, y, input, exponent))
        )


_register_power(operator.pow)
_register_power(torch.float_power)
