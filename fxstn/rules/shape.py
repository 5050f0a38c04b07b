"""Views, copies, joins and splits: linear."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fxstn.ir.tangents import ZERO
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import filled, linear, rule

Tensor = torch.Tensor

# A tangent may lie in memory in another order than its primal, or be expanded, where only a copy can be viewed.
linear(Tensor.view, tangent=Tensor.reshape)
linear(Tensor.expand_as, Tensor.reshape_as, sizes=True)
linear(Tensor.view_as, tangent=Tensor.reshape_as, sizes=True)
linear(torch.flatten, torch.ravel, torch.reshape, torch.unflatten, Tensor.unflatten)
linear(torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.t, torch.adjoint, torch.rot90)
linear(torch.unsqueeze, torch.squeeze, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)
linear(Tensor.expand, torch.broadcast_to, torch.narrow, torch.select, Tensor.unfold, operator.getitem)
linear(torch.flip, torch.fliplr, torch.flipud, torch.roll, Tensor.repeat, torch.tile, fresh=True)
linear(torch.cat, torch.stack, torch.hstack, torch.vstack, torch.dstack, torch.column_stack, fresh=True)
linear(torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.hsplit, torch.vsplit, torch.dsplit)


def _register_joint(function):
    @rule(function)
    def joint(d, *tensors, **settings):
        """Linear in all tensors jointly, which stand side by side or in one list."""
        packed = len(tensors) == 1 and isinstance(tensors[0], (list, tuple))
        values, tangents = (tensors[0], d.tensors[0]) if packed else (tensors, d.tensors)
        changes = [filled(dx, x) for dx, x in zip(tangents, values, strict=True)]
        return function(*values, **settings), function(*changes, **settings)


for function in (torch.block_diag, torch.broadcast_tensors, torch.meshgrid):
    _register_joint(function)


@rule(F.pad, fresh=True)
def pad(d, input, pad, mode="constant", value=None):
    constant = {"value": value} if mode == "constant" else {}
    return F.pad(input, pad, mode, **constant), F.pad(d.input, pad, mode)


@rule(getattr)
def attribute(d, object, name):
    if name in ("T", "mT", "H", "mH", "real", "imag"):
        return getattr(object, name), getattr(d.object, name)
    if name in ("shape", "dtype", "device", "ndim", "itemsize", "is_cuda", "layout", "data"):
        return getattr(object, name), ZERO
    raise NoRule(f"the attribute .{name} of a tensor that varies is not followed")
