"""Batch norm: in training mode its Jacobian is symmetric up to the affine part, so the fused backward is the tangent."""

from __future__ import annotations

import operator

import torch.nn.functional as F

from fxstn.layers.kernels import batch_norm_frozen_tangent, batch_norm_jacobian, batch_norm_with_statistics
from fxstn.rules.registry import NoRule, rule
from fxstn.tangents import ZERO


@rule(F.batch_norm)
def batch_norm(
    d, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    if d.weight is not ZERO or d.bias is not ZERO:
        raise NoRule("its affine parameters vary")
    if not training:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return y, batch_norm_frozen_tangent(d.input, running_mean, running_var, weight, eps)
    results = batch_norm_with_statistics(input, weight, bias, eps)
    y, mean, inverse_std = (operator.getitem(results, i) for i in range(3))
    return y, batch_norm_jacobian(d.input, input, weight, mean, inverse_std, eps)
