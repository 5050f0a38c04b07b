"""Activations. Where torch has a fused backward kernel it is the tangent: the Jacobian is symmetric."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fxstn.ops.complex_numbers import conjugate
from fxstn.ops.kernels import along_channels, softmax_jacobian
from fxstn.ops.linear_maps import self_adjoint
from fxstn.rules.fallback import fallback
from fxstn.rules.registry import pointwise, rule

aten = torch.ops.aten
SELU = (1.6732632423543772, 1.0507009873554805, 1.0)  # Klambauer et al. 2017: alpha, scale, input scale
silu_jacobian = self_adjoint(aten.silu_backward, lambda dx, x: dx * _silu_slope(x, torch.sigmoid(x)))
mish_jacobian = self_adjoint(aten.mish_backward, lambda dx, x: dx * _mish_slope(x, torch.tanh(F.softplus(x))))
hardswish_jacobian = self_adjoint(aten.hardswish_backward)
hardsigmoid_jacobian = self_adjoint(aten.hardsigmoid_backward, lambda dx, x: dx * ((torch.abs(x) < 3) / 6))
softplus_jacobian, leaky_relu_jacobian = self_adjoint(aten.softplus_backward), self_adjoint(aten.leaky_relu_backward)


def _silu_slope(x, gate):
    return gate * (1 + x * (1 - gate))


def _mish_slope(x, gate):
    return gate + x * torch.sigmoid(x) * (1 - gate * gate)


@self_adjoint
def sigmoid_jacobian(dx, y):
    return aten.sigmoid_backward(dx, conjugate(y))


@self_adjoint
def tanh_jacobian(dx, y):
    return aten.tanh_backward(dx, conjugate(y))


@self_adjoint
def elu_jacobian(dx, x, alpha, scale, input_scale):
    return aten.elu_backward(dx, alpha, scale, input_scale, False, x)


@self_adjoint
def gelu_jacobian(dx, x, approximate):
    return aten.gelu_backward(dx, x, approximate=approximate)


pointwise(torch.sigmoid, lambda dx, y, x: sigmoid_jacobian(dx, y))
pointwise(torch.tanh, lambda dx, y, x: tanh_jacobian(dx, y))
pointwise(F.relu, lambda dx, y, x, inplace=False: aten.threshold_backward(dx, y, 0))
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
pointwise(F.logsigmoid, lambda dx, y, x: dx * torch.sigmoid(-x))
pointwise(F.softsign, lambda dx, y, x: dx / (1 + torch.abs(x)) ** 2, real=True)
pointwise(F.tanhshrink, lambda dx, y, x: dx * torch.tanh(x) ** 2)
pointwise(F.prelu, lambda dx, y, x, weight: dx * torch.where(x > 0, 1, along_channels(weight, x)),
          lambda dw, y, x, weight: along_channels(dw, x) * torch.clamp(x, max=0),
          elementwise=1)  # fmt: skip
pointwise(torch.softmax, lambda dx, y, x, dim, dtype=None: softmax_jacobian(dx, y, dim))
pointwise(torch._safe_softmax, lambda dx, y, x, dim, dtype=None: softmax_jacobian(dx, y, dim))
pointwise(
    torch.log_softmax,
    lambda dx, y, x, dim, dtype=None: _log_softmax_tangent(dx if dtype is None else dx.to(dtype), y, dim),
)


def _log_softmax_tangent(dx, y, dim):
    return dx - (torch.exp(y) * dx).sum(dim, keepdim=True)


@rule(F.rrelu, fresh=True)
def rrelu(d, input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    """The slopes drawn are what comes out where −1 goes in."""
    slopes = -F.rrelu(torch.where(input > 0, input, -1), lower, upper, training)
    slopes = torch.where(input > 0, 1, slopes)
    return input * slopes, d.input * slopes


@rule(F.softmin, fresh=True)
def softmin(d, input, dim=None, _stacklevel=3, dtype=None):
    if dim is None:
        return fallback(F.softmin, (d.input,), (input,), {"dtype": dtype})
    y = F.softmin(input, dim=dim, dtype=dtype)
    return y, -softmax_jacobian(d.input, y, dim)


@rule(F.gumbel_softmax, random=True, fresh=True)
def gumbel_softmax(d, logits, tau=1.0, hard=False, eps=1e-10, dim=-1):
    """hard: one-hot values with the tangent of the soft ones, as in torch (straight through)."""
    soft = F.gumbel_softmax(logits, tau=tau, dim=dim)
    chosen = torch.zeros_like(soft).scatter(dim, torch.argmax(soft, dim, keepdim=True), 1.0) if hard else soft
    return chosen, softmax_jacobian(d.logits, soft, dim) / tau


@rule(F.glu)
def glu(d, input, dim=-1):
    halves, tangents = torch.chunk(input, 2, dim), torch.chunk(d.input, 2, dim)
    value, gate = operator.getitem(halves, 0), torch.sigmoid(operator.getitem(halves, 1))
    dvalue, dgate = operator.getitem(tangents, 0), operator.getitem(tangents, 1)
    return value * gate, dvalue * gate + dgate * (value * gate * (1 - gate))
