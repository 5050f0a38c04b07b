"""Rules of layers whose parameters respond to λ, such as linear and convolution (paper, Eq. 3.14; linearised, Eq. 3.13)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fxstn.ir.tangents import BATCH_FIRST, ZERO, Scaled
from fxstn.ops.kernels import change_of_norm
from fxstn.ops.response import (
    add_bias,
    add_channels,
    add_scaled,
    bias_tangent,
    materialised,
    pick_rows,
    scale_channels,
    without_bias,
)
from fxstn.ops.scaled import bias_shift, scaled_tangent
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import ParameterRole, rule

BIAS = ParameterRole("bias", (0,))


def _batch_axis(tangent):
    """Where the examples are, as a further argument; none in a plain network, so that its graph stays short."""
    where = tangent.batch_axis
    return () if where == BATCH_FIRST else (where,)


def with_scaled(dy, product, tangent, channel, repeats=1):
    """dy + the tangent of a weight: what its response makes of the input, each channel times its scale."""
    scale = pick_rows(tangent.scale, ((0, None),) * repeats) if repeats > 1 else tangent.scale
    scaled = (scale, channel, *_batch_axis(tangent))
    return scale_channels(product, *scaled) if dy is ZERO else add_scaled(dy, product, *scaled)


def with_shifted(dy, y, tangent, channel):
    """dy + the tangent of a bias of y."""
    change = (tangent.scale, tangent.response, channel, *_batch_axis(tangent))
    return bias_tangent(y, *change) if dy is ZERO else add_bias(dy, *change)


def scaled_layer(dy, y, d, weight, bias, channel, repeats=1):
    """dy + the tangent of a layer of which weight and bias are scaled, R being the parameter itself; None for any other.

    dy: what the tangent of the input gives, or ZERO.
    y: what the layer gives, of its product and its bias.
    """
    own = isinstance(d.weight, Scaled) and d.weight.response is weight
    if not own or not (d.bias is ZERO or (isinstance(d.bias, Scaled) and d.bias.response is bias)):
        return None
    scale = pick_rows(d.weight.scale, ((0, None),) * repeats) if repeats > 1 else d.weight.scale
    shift = None if bias is None else bias_shift(scale, bias, d.bias.scale if isinstance(d.bias, Scaled) else None)
    return scaled_tangent(None if dy is ZERO else dy, y, scale, shift, channel, *_batch_axis(d.weight))


def hyperlayer(d, operation, input, weight, bias, channel, repeats=1):
    """(y, dy) of operation(input, weight) + bias; the response's product shares the input of the general one."""
    y = operation(input, weight, bias)
    dy = ZERO if d.input is ZERO else operation(d.input, weight, None)
    if (
        isinstance(d.weight, Scaled) and channel == -1 and d.weight.axis == 1
    ):  # tied to an embedding: columns are scaled
        term = operation(scale_channels(input, d.weight.scale, -1, *_batch_axis(d.weight)), d.weight.response, None)
        dy = term if dy is ZERO else dy + term
    elif (scaled := scaled_layer(dy, y, d, weight, bias, channel, repeats)) is not None:
        return y, scaled
    elif isinstance(d.weight, Scaled):
        if d.weight.response is not weight:
            product = operation(input, d.weight.response, None)
        else:
            product = y if bias is None else without_bias(y, bias, channel)
        dy = with_scaled(dy, product, d.weight, channel, repeats)
    elif d.weight is not ZERO:
        term = operation(input, d.weight, None)
        dy = term if dy is ZERO else dy + term
    if isinstance(d.bias, Scaled):
        dy = with_shifted(dy, y, d.bias, channel)
    elif d.bias is not ZERO:
        dy = add_channels(torch.zeros_like(y) if dy is ZERO else dy, d.bias, channel)
    return y, dy


@rule(F.linear, kind="layer", fresh=True, reads={1: ParameterRole("weight", (0, 1)), 2: BIAS})
def linear_layer(d, input, weight, bias=None):
    return hyperlayer(d, F.linear, input, weight, bias, channel=-1)


@rule(F.bilinear, kind="layer", fresh=True, reads={2: ParameterRole("weight", (0,)), 3: BIAS})
def bilinear_layer(d, input1, input2, weight, bias=None):
    d.input = ZERO
    y, dy = hyperlayer(d, lambda _, w, b: F.bilinear(input1, input2, w, b), None, weight, bias, channel=-1)
    terms = [] if d.input1 is ZERO else [F.bilinear(d.input1, input2, weight)]
    terms += [] if d.input2 is ZERO else [F.bilinear(input1, d.input2, weight)]
    return y, sum(terms[1:], terms[0] if dy is ZERO else dy + terms[0]) if terms else dy


def _register_convolution(function, transposed, spatial):
    @rule(function, kind="layer", fresh=True, reads={1: ParameterRole("weight", (0,)), 2: BIAS})
    def convolution(d, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return hyperlayer(d, partial(function, **settings), input, weight, bias, channel=-1 - spatial)

    @rule(transposed, kind="layer", fresh=True, reads={1: ParameterRole("weight", (1,)), 2: BIAS})
    def transposed_convolution(
        d, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):  # fmt: skip
        settings = {"stride": stride, "padding": padding, "output_padding": output_padding, "groups": groups}
        operation = partial(transposed, dilation=dilation, **settings)
        return hyperlayer(d, operation, input, weight, bias, channel=-1 - spatial, repeats=groups)


for spatial in (1, 2, 3):
    convolutions = (getattr(torch, f"conv{spatial}d"), getattr(torch, f"conv_transpose{spatial}d"))
    _register_convolution(*convolutions, spatial)


def _looked_up(d, operation, weight, scale_grad_by_freq, sparse):
    """(y, dy) of a lookup, linear in its table, whose columns are scaled.

    scale_grad_by_freq, sparse: of the gradient of the table itself; that of its response is plain.
    """
    settings = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    y = operation(weight, **{name: value for name, value in settings.items() if value})
    if isinstance(d.weight, Scaled):
        of_response = y if d.weight.response is weight else operation(d.weight.response)
        return y, scale_channels(of_response, d.weight.scale, -1, *_batch_axis(d.weight))
    return y, ZERO if d.weight is ZERO else operation(d.weight)


@rule(F.embedding, kind="layer", fresh=True, reads={1: ParameterRole("table", (1,))})
def embedding(d, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:
        raise NoRule("max_norm changes the table in place")
    lookup = lambda table, **settings: F.embedding(input, table, padding_idx, **settings)  # noqa: E731
    return _looked_up(d, lookup, weight, scale_grad_by_freq, sparse)


@rule(F.embedding_bag, kind="layer", fresh=True, reads={1: ParameterRole("table", (1,))})
def embedding_bag(
    d, input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
):  # fmt: skip
    if max_norm is not None or mode == "max":
        raise NoRule("max_norm changes the table in place" if max_norm else "mode='max' is not linear in the table")

    def lookup(table, weights=per_sample_weights, **own):
        settings = {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx, **own}
        return F.embedding_bag(input, table, offsets, per_sample_weights=weights, **settings)

    y, dy = _looked_up(d, lookup, weight, scale_grad_by_freq, sparse)
    if d.per_sample_weights is not ZERO:
        term = lookup(weight, d.per_sample_weights)
        dy = term if dy is ZERO else dy + term
    return y, dy


@rule(torch._weight_norm, fresh=True)
def weight_norm(d, v, g, dim=0):
    """g v / ‖v‖, the norm over all axes but `dim` (Salimans & Kingma 2016); what torch's weight norm calls."""
    norm = torch.norm_except_dim(v, 2, dim)
    terms = [] if d.g is ZERO else [v * (d.g / norm)]
    if d.v is not ZERO:
        unit = v / norm
        terms.append(g / norm * (d.v - unit * change_of_norm(unit, d.v, dim)))
    return torch._weight_norm(v, g, dim), terms[0] if len(terms) == 1 else terms[0] + terms[1]


def dense(tangent):
    """The tangent of a parameter as a tensor, for one perturbation of the whole batch; any other tangent as it is."""
    return materialised(tangent.scale, tangent.response, tangent.axis) if isinstance(tangent, Scaled) else tangent
