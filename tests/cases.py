"""The test table: one line per rule. tests/test_rules.py checks every line in the same way."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from fxstn.layers.noise import alpha_dropout_coefficients, dropout_mask

Tensor = torch.Tensor


@dataclass(frozen=True)
class Case:
    """function(*tensors of the given shapes, *args, **kwargs).

    domain: interval that entries are drawn from, kinks excluded by distance. packed: the tensors go in one list. varying:
    positions of the tensors that get a tangent. away: points at which the function has a kink. integer: round the entries.
    """

    function: Any
    shapes: tuple = ((3, 4),)
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    domain: tuple[float, float] = (-2.0, 2.0)
    packed: bool = False
    varying: tuple[int, ...] | None = None
    away: tuple[float, ...] = ()
    integer: bool = False


IMAGE = ((2, 3, 6, 6),)
MATRIX = ((3, 4),)
POSITIVE = (0.3, 2.0)

CASES = [
    # elementwise
    Case(operator.neg),
    Case(torch.exp),
    Case(torch.expm1),
    Case(torch.log, domain=POSITIVE),
    Case(torch.log1p, domain=POSITIVE),
    Case(torch.log2, domain=POSITIVE),
    Case(torch.sqrt, domain=POSITIVE),
    Case(torch.rsqrt, domain=POSITIVE),
    Case(torch.square),
    Case(torch.reciprocal, domain=POSITIVE),
    Case(torch.abs, away=(0.0,)),
    Case(torch.sin),
    Case(torch.cos),
    Case(torch.atan),
    Case(torch.erf),
    Case(torch.sinh),
    Case(torch.cosh),
    Case(torch.sigmoid),
    Case(torch.tanh),
    Case(torch.clamp, args=(-1.0, 0.5), away=(-1.0, 0.5)),
    Case(torch.nan_to_num),
    Case(torch.real),
    # activations
    Case(F.relu, away=(0.0,)),
    Case(F.relu6, domain=(-2.0, 8.0), away=(0.0, 6.0)),
    Case(F.silu),
    Case(F.mish),
    Case(F.gelu),
    Case(F.gelu, kwargs={"approximate": "tanh"}),
    Case(F.softplus),
    Case(F.softplus, args=(2.0, 20.0)),
    Case(F.softsign, away=(0.0,)),
    Case(F.tanhshrink),
    Case(F.logsigmoid),
    Case(F.leaky_relu, args=(0.1,), away=(0.0,)),
    Case(F.leaky_relu, kwargs={"negative_slope": 0.2}, away=(0.0,)),
    Case(F.elu, kwargs={"alpha": 0.7}, away=(0.0,)),
    Case(
        F.celu, kwargs={"alpha": 0.5}, away=(0.0,)
    ),  # torch's own derivative rounds 1/alpha to float32: take a power of 2
    Case(F.selu, away=(0.0,)),
    Case(F.hardtanh, args=(-1.0, 1.5), away=(-1.0, 1.5)),
    Case(F.hardswish, domain=(-5.0, 5.0), away=(-3.0, 3.0)),
    Case(F.hardsigmoid, domain=(-5.0, 5.0), away=(-3.0, 3.0)),
    Case(F.threshold, args=(0.1, 20.0), away=(0.1,)),
    Case(F.softshrink, away=(-0.5, 0.5)),
    Case(F.hardshrink, away=(-0.5, 0.5)),
    Case(torch.softmax, args=(1,)),
    Case(torch.log_softmax, args=(1,)),
    # two arguments
    Case(operator.add, shapes=((3, 4), (3, 4))),
    Case(operator.add, shapes=((3, 4), (4,)), varying=(1,)),
    Case(operator.add, shapes=((4,), (3, 4)), varying=(0,)),
    Case(operator.add, args=(2.0,)),
    Case(operator.sub, shapes=((3, 4), (4,))),
    Case(operator.sub, shapes=((3, 4), (4,)), varying=(1,)),
    Case(operator.mul, shapes=((3, 4), (3, 1))),
    Case(operator.mul, shapes=((3, 4), (3, 4)), varying=(0,)),
    Case(operator.truediv, shapes=((3, 4), (3, 4)), domain=POSITIVE),
    Case(operator.truediv, args=(3.0,)),
    Case(operator.pow, args=(3,)),
    Case(torch.remainder, args=(0.7,), domain=(0.1, 0.6)),
    Case(operator.pow, shapes=((3, 4), (3, 4)), domain=POSITIVE),
    Case(operator.matmul, shapes=((3, 4), (4, 2))),
    Case(torch.mm, shapes=((3, 4), (4, 2)), varying=(1,)),
    Case(torch.bmm, shapes=((2, 3, 4), (2, 4, 2))),
    # shapes
    Case(torch.clone),
    Case(Tensor.contiguous),
    Case(Tensor.double),
    Case(Tensor.float, varying=()),
    Case(Tensor.to, args=(torch.float64,)),
    Case(Tensor.type_as, shapes=((3, 4), (2,)), varying=(0,)),
    Case(torch.flatten, shapes=IMAGE, args=(1,)),
    Case(torch.reshape, args=((2, 6),)),
    Case(Tensor.view, args=(2, 6)),
    Case(torch.permute, shapes=IMAGE, args=((0, 2, 3, 1),)),
    Case(torch.transpose, args=(0, 1)),
    Case(torch.swapaxes, args=(0, 1)),
    Case(torch.movedim, shapes=IMAGE, args=(1, 3)),
    Case(torch.t),
    Case(torch.unsqueeze, args=(1,)),
    Case(torch.squeeze, shapes=((3, 1, 4),), args=(1,)),
    Case(torch.unflatten, args=(1, (2, 2))),
    Case(Tensor.unflatten, args=(1, (2, 2))),
    Case(Tensor.expand, shapes=((3, 1),), args=(3, 5)),
    Case(Tensor.expand_as, shapes=((3, 1), (3, 5)), varying=(0,)),
    Case(Tensor.view_as, shapes=((3, 4), (2, 6)), varying=(0,)),
    Case(Tensor.reshape_as, shapes=((3, 4), (2, 6)), varying=(0,)),
    Case(Tensor.repeat, args=(1, 2)),
    Case(Tensor.unfold, args=(1, 2, 1)),
    Case(torch.broadcast_to, shapes=((3, 1),), args=((3, 5),)),
    Case(torch.tile, args=((1, 2),)),
    Case(torch.flip, args=((1,),)),
    Case(torch.roll, args=(1, 1)),
    Case(torch.narrow, args=(1, 1, 2)),
    Case(torch.select, args=(1, 2)),
    Case(torch.cat, shapes=((3, 2), (3, 4)), args=(1,), packed=True),
    Case(torch.cat, shapes=((3, 2), (3, 4)), args=(1,), packed=True, varying=(1,)),
    Case(torch.stack, shapes=((3, 4), (3, 4)), args=(1,), packed=True, varying=(0,)),
    Case(torch.chunk, args=(2, 1)),
    Case(torch.split, args=(3, 1)),
    Case(torch.tensor_split, args=(2, 1)),
    Case(torch.unbind, args=(1,)),
    Case(operator.getitem, shapes=IMAGE, args=((slice(None), 1, ..., slice(0, None, 2)),)),
    Case(torch.mean, shapes=IMAGE, args=((2, 3),), kwargs={"keepdim": True}),
    Case(torch.sum, args=(1,)),
    Case(torch.cumsum, args=(1,)),
    Case(F.pad, shapes=IMAGE, args=((1, 2, 0, 1),), kwargs={"value": 3.0}),
    Case(F.pad, shapes=IMAGE, args=((1, 1, 1, 1),), kwargs={"mode": "reflect"}),
    Case(F.pixel_shuffle, shapes=((2, 4, 3, 3),), args=(2,)),
    Case(F.pixel_unshuffle, shapes=IMAGE, args=(2,)),
    # pooling
    Case(F.avg_pool1d, shapes=((2, 3, 8),), args=(2,)),
    Case(F.avg_pool2d, shapes=IMAGE, args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.avg_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.adaptive_avg_pool1d, shapes=((2, 3, 8),), args=(3,)),
    Case(F.adaptive_avg_pool2d, shapes=IMAGE, args=((4, 2),)),
    Case(F.adaptive_avg_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.max_pool1d, shapes=((2, 3, 8),), args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.max_pool2d, shapes=IMAGE, args=(3,), kwargs={"stride": 2, "padding": 1}),
    Case(F.max_pool2d, shapes=IMAGE, args=(2,), kwargs={"ceil_mode": True, "dilation": 2}),
    Case(F.max_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    Case(F.adaptive_max_pool1d, shapes=((2, 3, 8),), args=(3,)),
    Case(F.adaptive_max_pool2d, shapes=IMAGE, args=((4, 2),)),
    Case(F.adaptive_max_pool3d, shapes=((2, 3, 4, 4, 4),), args=(2,)),
    # layers: tangents of input, weight and bias; structured ones are checked in test_tangents.py
    Case(F.linear, shapes=((3, 4), (5, 4), (5,)), varying=(0,)),
    Case(torch.conv1d, shapes=((2, 4, 7), (6, 2, 3), (6,)), kwargs={"groups": 2, "padding": 1}, varying=(0,)),
    Case(torch.conv2d, shapes=((2, 3, 6, 6), (4, 3, 3, 3)), kwargs={"stride": 2, "dilation": 2}, varying=(0,)),
    Case(torch.conv3d, shapes=((2, 2, 4, 4, 4), (3, 2, 2, 2, 2)), varying=(0,)),
    Case(F.batch_norm, shapes=((5, 3, 4), (3,), (3,), (3,), (3,)), args=(False,), domain=POSITIVE, varying=(0,)),
    Case(getattr, args=("T",)),
]

# Piecewise constant or cut off on purpose: a tangent goes in, ZERO comes out.
ZERO_CASES = [
    *(Case(f) for f in (torch.detach, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.argmax)),
    *(Case(f) for f in (torch.argmin, Tensor.size, Tensor.dim, Tensor.numel, torch.numel)),
    *(Case(f, args=(0.3,)) for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)),
    *(Case(f, args=(0.3,)) for f in (operator.floordiv, torch.floor_divide, torch.bernoulli)),
    *(Case(f) for f in (torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.empty_like)),
    Case(torch.full_like, args=(1.0,)),
    *(Case(f, domain=(0, 1), integer=True, shapes=((3,), (3,))) for f in (operator.and_, operator.or_, operator.xor)),
    *(Case(f, args=((2,),)) for f in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty)),
    Case(Tensor.new_full, args=((2,), 1.0)),
    *(Case(f, args=(0.3,)) for f in (dropout_mask, alpha_dropout_coefficients)),
]
