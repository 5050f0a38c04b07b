"""One recurrent layer in one direction: by torch's fused kernel, step by step, and the recurrence of its tangent.

Modes "lstm", "gru", "rnn_tanh", "rnn_relu", with torch's weights and order of gates; all values time-major, (time, batch, n).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BatchAxis
from fxstn.ops.response import align, materialised

APART = "RNN module weights are not part of single contiguous chunk"  # cuDNN says that it copies weights at each call
_OF_CELLS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm_cell, "gru": torch.gru_cell, "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell,
}  # fmt: skip
_FUSED: dict[str, Callable[..., Any]] = {"gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


@staged(overridable=True, closed=True)
def recurrent_layer(
    mode: str, x: Tensor, h: Tensor, c: Tensor | None, weight_ih: Tensor, bias_ih: Tensor | None, weight_hh: Tensor,
    bias_hh: Tensor | None, weight_hr: Tensor | None = None, cell: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One layer in one direction, by torch's fused kernel (cuDNN, oneDNN).

    mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
    x: (time, batch, n).
    h, c: (batch, n), the state before; c of an LSTM only.
    weight_ih, bias_ih, weight_hh, bias_hh: as of nn.RNNBase.
    weight_hr: projection of an LSTM (Sak et al. 2014).
    cell: whether it is a cell, of one step and without projection: its kernel may leave another type under autocast.

    Returns (y, last h), of an LSTM (y, last h, last c).
    """
    if cell:
        assert len(x) == 1
        state = h if c is None else (h, c)
        results = _OF_CELLS[mode](x[0], state, weight_ih, weight_hh, bias_ih, bias_hh)
        return (results[None], results) if c is None else (results[0][None], *results)
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if w is not None]
    settings = (weights, bias_ih is not None, 1, 0.0, True, False, False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", APART)
        if mode == "lstm":
            assert c is not None
            y, h, c = torch.lstm(x, (h[None], c[None]), *settings)
            return y, h[0], c[0]
        y, h = _FUSED[mode](x, h[None], *settings)
        return y, h[0]


Change = tuple[Tensor, Tensor, int, int]


class Steps(NamedTuple):
    """What a layer did, by step: all but `results` have the steps in dimension 0.

    results: as of `recurrent_layer`.
    previous: h before each step.
    hidden: weight_hh · previous.
    full: h before an LSTM's projection, else None.
    by_input, by_hidden: (time, batch, gates, n), derivatives of the new state (LSTM: cell, and of the output for its last
        gate) in what enters each gate from the input, and from h.
    carry: derivative of the new state in the state before; None stands for zero.
    output: of an LSTM, derivative of h in the cell.
    """

    results: tuple[Tensor, ...]
    previous: Tensor
    hidden: Tensor
    full: Tensor | None
    by_input: Tensor
    by_hidden: Tensor
    carry: Tensor | None
    output: Tensor | None


class _LSTM:
    @staticmethod
    def step(x: Tensor, v: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        i, f, g, o = (x + v).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new = torch.addcmul(i * g, f, c)
        squashed = new.tanh()
        return o * squashed, new, (i, f, g, o, c, squashed)

    @staticmethod
    def derivatives(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor, squashed: Tensor) -> tuple:
        gates = torch.stack([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)], -2)
        return gates, gates, f, o * (1 - squashed * squashed)


class _GRU:
    @staticmethod
    def step(x: Tensor, v: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        (xr, xz, xn), (vr, vz, vn) = x.chunk(3, -1), v.chunk(3, -1)
        r, z = (xr + vr).sigmoid(), (xz + vz).sigmoid()
        n = torch.addcmul(xn, r, vn).tanh()
        return n + z * (h - n), None, (r, z, n, vn, h)

    @staticmethod
    def derivatives(r: Tensor, z: Tensor, n: Tensor, v: Tensor, h: Tensor) -> tuple:
        by_n = (1 - z) * (1 - n * n)
        by_r, by_z = by_n * v * r * (1 - r), (h - n) * z * (1 - z)
        return torch.stack([by_r, by_z, by_n], -2), torch.stack([by_r, by_z, by_n * r], -2), z, None


class _RNN:
    """activation, and its slope as a function of its result."""

    def __init__(self, activation: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> None:
        self.activation, self.slope = activation, slope

    def step(self, x: Tensor, v: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        new = self.activation(x + v)
        return new, None, (new,)

    def derivatives(self, h: Tensor) -> tuple:
        gate = self.slope(h).unsqueeze(-2)
        return gate, gate, None, None


_CELLS: dict[str, Any] = {
    "lstm": _LSTM,
    "gru": _GRU,
    "rnn_tanh": _RNN(torch.tanh, lambda h: 1 - h * h),
    "rnn_relu": _RNN(torch.relu, lambda h: (h > 0).to(h.dtype)),
}


@staged(closed=True)
def steps(
    mode: str, products: Tensor, h: Tensor, c: Tensor | None, weight_hh: Tensor, bias_hh: Tensor | None,
    weight_hr: Tensor | None,
) -> Steps:  # fmt: skip
    """A layer, one step after the other.

    products: (time, batch, gates · n), what the input gives to the gates.
    mode, h, c, weight_hh, bias_hh, weight_hr: as in `recurrent_layer`.
    """
    weight = weight_hh.to(products.dtype).t()
    projection = None if weight_hr is None else weight_hr.to(products.dtype).t()
    cell = _CELLS[mode]
    saved: list[tuple[Tensor, ...]] = []
    h = h.to(torch.promote_types(h.dtype, products.dtype))
    c = c if c is None else c.to(torch.promote_types(c.dtype, products.dtype))
    outputs, hidden, full = [h], [], []
    for x in products:
        v = h.to(weight.dtype) @ weight
        hidden.append(v)
        h, c, residuals = cell.step(x, v if bias_hh is None else v + bias_hh, h, c)
        saved.append(residuals)
        if projection is not None:
            full.append(h)
            h = h.to(weight.dtype) @ projection
        outputs.append(h)
    derivatives = cell.derivatives(*(torch.stack(values) for values in zip(*saved, strict=True)))
    joined = torch.stack(outputs)
    results = (joined[1:], h) if c is None else (joined[1:], h, c)
    return Steps(results, joined[:-1], torch.stack(hidden), torch.stack(full) if full else None, *derivatives)


@staged(closed=True)
def perturbed_layer(
    mode: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: tuple,
    changes: tuple[Change | None, ...],
    cell: bool = False,
) -> tuple[Tensor, ...]:
    """`recurrent_layer` with weights moved by a finite step.

    weights, cell: its last arguments.
    changes: for each weight None, or (scale, response, left, right). scale is one row for the whole batch, or one per
        example; the examples are then left · batch · right in dimension 1.
    """
    if all(change is None or change[0].dim() == 1 for change in changes):
        pairs = zip(weights, changes, strict=True)
        moved = (w if change is None else w + materialised(change[0], change[1], 0) for w, change in pairs)
        return recurrent_layer(mode, x, h, c, *(*moved, cell))
    weight_ih, bias_ih, weight_hh, bias_hh, weight_hr = weights
    on_input, on_shift, on_hidden, on_bias, on_projection = changes

    def product(value: Tensor, weight: Tensor, change: Change | None, axis: int) -> Tensor:
        """(weight + change) · value, the batch along `axis`."""
        y = F.linear(value, weight)
        if change is None:
            return y
        scale, response, left, right = change
        of_response = y if response is weight else F.linear(value, response)
        return torch.addcmul(y, of_response, align(scale, y, -1, BatchAxis(axis, left, right)))

    def bias(value: Tensor | None, change: Change | None, like: Tensor, axis: int) -> Tensor | float:
        if value is None:
            return 0.0
        scale, response, left, right = change or (value.new_zeros(len(value)), value, 1, 1)
        return value + align(scale * response, like, -1, BatchAxis(axis, left, right))

    products = product(x, weight_ih, on_input, 1)
    products = products + bias(bias_ih, on_shift, products, 1)
    shift, outputs = bias(bias_hh, on_bias, products[0], 0), []
    for entering in products:
        h, c, _ = _CELLS[mode].step(entering, product(h, weight_hh, on_hidden, 0) + shift, h, c)
        if weight_hr is not None:
            h = product(h, weight_hr, on_projection, 0)
        outputs.append(h)
    y = torch.stack(outputs)
    return (y, h) if c is None else (y, h, c)


@staged
def time_major(x: Tensor, batch_first: bool) -> Tensor:
    """The input of nn.RNN with time first.

    It is contiguous: otherwise torch multiplies it with a weight one step at a time.

    x: (time, batch, n), (batch, time, n) where `batch_first`, or (time, n) without examples.

    Returns (time, batch, n).
    """
    return x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1).contiguous() if batch_first else x


@staged
def from_time_major(y: Tensor, rank: int, batch_first: bool) -> Tensor:
    """The inverse of `time_major`.

    y: (time, batch, n).
    rank: of nn.RNN's input.
    """
    return y.squeeze(1) if rank == 2 else y.transpose(0, 1).contiguous() if batch_first else y


@staged
def state_of(h: Tensor, index: int) -> Tensor:
    """The state of one layer and direction, (batch, n).

    h: of nn.RNN, (layers · directions, batch, n), or (layers · directions, n) without examples.
    """
    return h[index] if h.dim() == 3 else h[index].unsqueeze(0)


@staged
def zero_state(x: Tensor, size: int) -> Tensor:
    """(batch, size) of zeros, of time-major x."""
    return x.new_zeros(x.shape[1], size)


@staged
def joined_states(states: list[Tensor], rank: int) -> Tensor:
    """The h of nn.RNN, the inverse of `state_of`.

    states: (batch, n) of each layer and direction.
    rank: of nn.RNN's input.
    """
    joined = torch.stack(states)
    return joined.squeeze(1) if rank == 2 else joined
