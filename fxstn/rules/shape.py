"""Views, copies, joins, splits and reductions that are linear; sizes and indices, whose tangent is ZERO."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fxstn.rules.registry import NoRule, linear, rule, zero
from fxstn.tangents import ZERO

Tensor = torch.Tensor

linear(torch.flatten, torch.reshape, Tensor.view, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze)
linear(
    Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.view_as, Tensor.reshape_as, Tensor.unfold, Tensor.unflatten
)
linear(
    torch.unflatten,
    torch.movedim,
    torch.swapaxes,
    torch.t,
    torch.flip,
    torch.roll,
    torch.narrow,
    torch.select,
    torch.tile,
)
linear(torch.cat, torch.stack, torch.chunk, torch.split, torch.tensor_split, torch.unbind, operator.getitem)
linear(torch.mean, torch.sum, torch.cumsum, torch.broadcast_to, F.pixel_shuffle, F.pixel_unshuffle)
linear(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
linear(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

zero(Tensor.size, Tensor.dim, Tensor.numel, torch.argmax, torch.argmin, torch.numel, Tensor.new_zeros, Tensor.new_ones)


@rule(F.pad)
def pad(d, input, pad, mode="constant", value=None):
    constant = {"value": value} if mode == "constant" else {}
    return F.pad(input, pad, mode, **constant), F.pad(d.input, pad, mode)


@rule(getattr)
def attribute(d, object, name):
    if name in ("T", "mT"):
        return getattr(object, name), getattr(d.object, name)
    if name in ("shape", "dtype", "device", "ndim", "itemsize", "is_cuda", "layout"):
        return getattr(object, name), ZERO
    raise NoRule(f"the attribute .{name} of a tensor that varies is not followed")
