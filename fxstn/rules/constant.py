"""Piecewise constant functions, comparisons, indices, shapes, and what is cut off on purpose: the tangent is ZERO."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fxstn.ops.heads import joint_mask
from fxstn.rules.registry import zero

Tensor = torch.Tensor

zero(torch.detach, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.floor_divide)
zero(operator.floordiv, F.one_hot, torch.isclose, torch.isfinite, torch.argsort, torch.argwhere, fresh=True)
zero(torch.heaviside, torch.signbit)
zero(torch.div)  # with a rounding mode; without one it is spelled operator.truediv
zero(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
zero(torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.allclose, torch.equal)
zero(operator.and_, operator.or_, operator.xor, operator.invert)
zero(torch.logical_and, torch.logical_or, torch.logical_xor, torch.logical_not, torch.any, torch.all)
zero(torch.isnan, torch.isinf, torch.isneginf, torch.isposinf, torch.isin)
zero(torch.argmax, torch.argmin, torch.nonzero, torch.count_nonzero)
zero(torch.searchsorted, torch.bucketize, torch.unique, torch.unique_consecutive, torch.multinomial, torch.bernoulli)
zero(torch.normal)  # a draw
zero(Tensor.int, Tensor.long, Tensor.short, Tensor.bool, Tensor.byte, Tensor.char)
zero(
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    torch.numel,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.get_device,
    Tensor.is_contiguous,
)
zero(torch.is_floating_point, torch.is_complex, Tensor.is_floating_point, Tensor.element_size)
zero(torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.empty_like, torch.full_like)
zero(torch.randint_like)
zero(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
zero(joint_mask)
