"""Elementwise functions and others with a symmetric Jacobian."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F

from fxstn.layers.kernels import self_adjoint
from fxstn.layers.noise import alpha_dropout_coefficients, dropout_mask, row_mask
from fxstn.rules.registry import additive, bilinear, linear, pointwise, rule, zero
from fxstn.tangents import ZERO

aten = torch.ops.aten
SELU = (1.6732632423543772, 1.0507009873554805, 1.0)  # Klambauer et al. 2017: alpha, scale, input scale
sigmoid_jacobian, tanh_jacobian = self_adjoint(aten.sigmoid_backward), self_adjoint(aten.tanh_backward)
silu_jacobian, mish_jacobian = self_adjoint(aten.silu_backward), self_adjoint(aten.mish_backward)
hardswish_jacobian, hardsigmoid_jacobian = (
    self_adjoint(aten.hardswish_backward),
    self_adjoint(aten.hardsigmoid_backward),
)
softplus_jacobian, leaky_relu_jacobian = self_adjoint(aten.softplus_backward), self_adjoint(aten.leaky_relu_backward)


@self_adjoint
def elu_jacobian(dx, x, alpha, scale, input_scale):
    return aten.elu_backward(dx, alpha, scale, input_scale, False, x)


@self_adjoint
def gelu_jacobian(dx, x, approximate):
    return aten.gelu_backward(dx, x, approximate=approximate)


linear(operator.neg, torch.clone, torch.Tensor.contiguous, torch.Tensor.float, torch.Tensor.double, torch.Tensor.to)
linear(torch.Tensor.type_as, torch.real)
additive(operator.add)
additive(operator.sub)
bilinear(operator.mul, operator.matmul, torch.bmm, torch.mm)
zero(torch.detach, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.floor_divide, operator.floordiv)
zero(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
zero(operator.and_, operator.or_, operator.xor)
zero(dropout_mask, alpha_dropout_coefficients, row_mask)
zero(torch.Tensor.new_empty, torch.Tensor.new_full, torch.bernoulli)
zero(torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.empty_like, torch.full_like)


@rule(operator.truediv)
def divide(d, a, b):
    y = a / b
    terms = ([] if d.a is ZERO else [d.a / b]) + ([] if d.b is ZERO else [-(y * d.b) / b])
    return y, terms[0] if len(terms) == 1 else terms[0] + terms[1]


@rule(operator.pow)
def power(d, base, exponent):
    y = base**exponent
    if d.exponent is ZERO and isinstance(exponent, (int, float)) and exponent == 0:
        return y, ZERO
    terms = [] if d.base is ZERO else [d.base * (exponent * base ** (exponent - 1))]
    log = math.log if isinstance(base, (int, float)) else torch.log
    terms += [] if d.exponent is ZERO else [d.exponent * y * log(base)]
    return y, terms[0] if len(terms) == 1 else terms[0] + terms[1]


pointwise(F.relu, lambda dx, y, x, inplace=False: aten.threshold_backward(dx, y, 0))
pointwise(torch.nan_to_num, lambda dx, y, x, *_, **__: dx * torch.isfinite(x))
pointwise(torch.remainder, lambda dx, y, x, divisor: dx)
pointwise(torch.exp, lambda dx, y, x: dx * y)
pointwise(torch.expm1, lambda dx, y, x: dx * (y + 1))
pointwise(torch.log, lambda dx, y, x: dx / x)
pointwise(torch.log1p, lambda dx, y, x: dx / (x + 1))
pointwise(torch.log2, lambda dx, y, x: dx / (x * math.log(2)))
pointwise(torch.sqrt, lambda dx, y, x: dx / (2 * y))
pointwise(torch.rsqrt, lambda dx, y, x: dx * (-0.5 * y * y * y))
pointwise(torch.square, lambda dx, y, x: dx * (2 * x))
pointwise(torch.reciprocal, lambda dx, y, x: -dx * (y * y))
pointwise(torch.abs, lambda dx, y, x: dx * torch.sign(x))
pointwise(torch.sin, lambda dx, y, x: dx * torch.cos(x))
pointwise(torch.cos, lambda dx, y, x: -dx * torch.sin(x))
pointwise(torch.atan, lambda dx, y, x: dx / (1 + x * x))
pointwise(torch.erf, lambda dx, y, x: dx * (2 / math.sqrt(math.pi) * torch.exp(-x * x)))
pointwise(torch.sinh, lambda dx, y, x: dx * torch.cosh(x))
pointwise(torch.cosh, lambda dx, y, x: dx * torch.sinh(x))
pointwise(torch.sigmoid, lambda dx, y, x: sigmoid_jacobian(dx, y))
pointwise(torch.tanh, lambda dx, y, x: tanh_jacobian(dx, y))
pointwise(F.logsigmoid, lambda dx, y, x: dx * torch.sigmoid(-x))
pointwise(F.softsign, lambda dx, y, x: dx / (1 + torch.abs(x)) ** 2)
pointwise(F.tanhshrink, lambda dx, y, x: dx * (x - y) ** 2)
pointwise(F.relu6, lambda dx, y, x, inplace=False: aten.hardtanh_backward(dx, x, 0.0, 6.0))
pointwise(F.silu, lambda dx, y, x, inplace=False: silu_jacobian(dx, x))
pointwise(F.mish, lambda dx, y, x, inplace=False: mish_jacobian(dx, x))
pointwise(F.hardswish, lambda dx, y, x, inplace=False: hardswish_jacobian(dx, x))
pointwise(F.hardsigmoid, lambda dx, y, x, inplace=False: hardsigmoid_jacobian(dx, x))
pointwise(F.gelu, lambda dx, y, x, approximate="none": gelu_jacobian(dx, x, approximate))
pointwise(F.softplus, lambda dx, y, x, beta=1, threshold=20: softplus_jacobian(dx, x, beta, threshold))
pointwise(
    F.leaky_relu, lambda dx, y, x, negative_slope=0.01, inplace=False: leaky_relu_jacobian(dx, x, negative_slope, False)
)
pointwise(
    F.hardtanh,
    lambda dx, y, x, min_val=-1.0, max_val=1.0, inplace=False: aten.hardtanh_backward(dx, x, min_val, max_val),
)
pointwise(F.threshold, lambda dx, y, x, threshold, value, inplace=False: aten.threshold_backward(dx, x, threshold))
pointwise(F.softshrink, lambda dx, y, x, lambd=0.5: dx * (torch.abs(x) > lambd))
pointwise(F.hardshrink, lambda dx, y, x, lambd=0.5: dx * (torch.abs(x) > lambd))
pointwise(F.elu, lambda dx, y, x, alpha=1.0, inplace=False: elu_jacobian(dx, x, alpha, 1.0, 1.0))
pointwise(F.celu, lambda dx, y, x, alpha=1.0, inplace=False: elu_jacobian(dx, x, alpha, 1.0, 1.0 / alpha))
pointwise(F.selu, lambda dx, y, x, inplace=False: elu_jacobian(dx, x, *SELU))
pointwise(torch.clamp, lambda dx, y, x, min=None, max=None: dx * (y == x))
pointwise(torch.softmax, lambda dx, y, x, dim, dtype=None: y * (dx - (y * dx).sum(dim, keepdim=True)))
pointwise(torch.log_softmax, lambda dx, y, x, dim, dtype=None: dx - (torch.exp(y) * dx).sum(dim, keepdim=True))
