"""Recurrent layers: the gates' tangents for the whole sequence at once, then a linear recurrence through time."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from fxstn.ir.staging import call
from fxstn.ir.tangents import ZERO, Scaled
from fxstn.ops.recurrence import entering, recurrence_tangent
from fxstn.ops.recurrent import (
    from_time_major,
    joined_states,
    perturbed_layer,
    recurrent_layer,
    state_of,
    steps,
    time_major,
    zero_state,
)
from fxstn.rules.layers import BIAS, linear_layer, with_scaled, with_shifted
from fxstn.rules.registry import ParameterRole, linear, rule, zero

WEIGHT = ParameterRole("weight", (0,))

linear(time_major, from_time_major, state_of, joined_states)
zero(zero_state)


@rule(torch._pack_padded_sequence, fresh=True)
def pack(d, input, lengths, batch_first):
    packed = lambda x: call(torch._pack_padded_sequence, x, lengths, batch_first)  # noqa: E731
    return packed(input), (operator.getitem(packed(d.input), 0), ZERO)


@rule(torch._pad_packed_sequence, fresh=True)
def pad(d, data, batch_sizes, batch_first, padding_value, total_length):
    padded = lambda x, value: call(torch._pad_packed_sequence, x, batch_sizes, batch_first, value, total_length)  # noqa: E731
    return padded(data, padding_value), (operator.getitem(padded(d.data, 0.0), 0), ZERO)


def _or_none(tangent):
    """A tangent as the helpers of `fxstn.ops.recurrent` take it: None where it is ZERO."""
    return None if tangent is ZERO else tangent


def _change(tangent):
    """The tangent of a weight as `perturbed_layer` takes it."""
    if tangent is ZERO:
        return None
    return tangent.scale, tangent.response, tangent.batch_axis.left, tangent.batch_axis.right


def _moved(d, mode, x, h, c, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr=None, cell=False):
    """The layer at weights moved by a finite step."""
    weights = (weight_ih, bias_ih, weight_hh, bias_hh, weight_hr)
    changes = (d.weight_ih, d.bias_ih, d.weight_hh, d.bias_hh, d.weight_hr)
    return perturbed_layer(mode, x, h, c, weights, tuple(map(_change, changes)), cell)


def _through(d_weight, product, value, weight):
    """The tangent of weight · value in the weight alone; ZERO where the weight does not vary.

    product: weight · value.
    """
    if isinstance(d_weight, Scaled):
        of_response = product if d_weight.response is weight else F.linear(value, d_weight.response)
        return with_scaled(ZERO, of_response, d_weight, -1)
    return ZERO if d_weight is ZERO else F.linear(value, d_weight)


@rule(
    recurrent_layer,
    kind="layer",
    fresh=True,
    reads={4: WEIGHT, 5: BIAS, 6: WEIGHT, 7: BIAS, 8: WEIGHT},
    finite=_moved,
)
def recurrent(d, mode, x, h, c, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr=None, cell=False):
    of_input = SimpleNamespace(input=d.x, weight=d.weight_ih, bias=d.bias_ih)
    products, dx = linear_layer(of_input, x, weight_ih, bias_ih)
    trace: Any = steps(mode, products, h, c, weight_hh, bias_hh, weight_hr)
    results, previous, hidden, full, by_input, by_hidden = (operator.getitem(trace, i) for i in range(6))
    dv = _through(d.weight_hh, hidden, previous, weight_hh)
    if isinstance(d.bias_hh, Scaled):
        dv = with_shifted(dv, hidden, d.bias_hh, -1)
    elif d.bias_hh is not ZERO:
        dv = d.bias_hh.expand_as(hidden) if dv is ZERO else dv + d.bias_hh
    y = operator.getitem(results, 0)
    projected = ZERO if weight_hr is None else _through(d.weight_hr, y, full, weight_hr)
    gates = entering(by_input, by_hidden, _or_none(dx), _or_none(dv))
    dh, dc, projected = map(_or_none, (d.h, d.c, projected))
    tangent = recurrence_tangent(mode, gates, dh, dc, projected, trace, weight_hh, weight_hr)
    return results, tuple(operator.getitem(tangent, i) for i in range(3 if mode == "lstm" else 2))
