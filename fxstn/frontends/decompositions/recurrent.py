"""Recurrent modules and functions, a layer and direction at a time, so that dropout between layers is conditioned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxstn.frontends.decompositions.registry import decomposes
from fxstn.ir.staging import call
from fxstn.ops.recurrent import from_time_major, joined_states, recurrent_layer, state_of, time_major, zero_state

STATEFUL = (nn.RNNBase, nn.LSTMCell)  # return a state beside their output, which is what a spec that names them acts on
State = Tensor | tuple[Tensor, Tensor] | None
Cell = nn.LSTMCell | nn.GRUCell | nn.RNNCell
PACKED = "a graph cannot hold a packed sequence, whose sizes are data; the forward as it is can"


def recurrent(
    mode: str, input: Tensor, hx: State, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What torch.lstm, torch.gru, torch.rnn_tanh and torch.rnn_relu compute.

    input: (time, batch, n), (batch, time, n) where `batch_first`, or (time, n) without examples.
    hx: h, or of an LSTM (h, c), each (layers · directions, batch, n); None for zeros.
    params: weight_ih, weight_hh, the biases and a projection of each layer and direction.

    Returns (output, h), of an LSTM (output, h, c).
    """
    rank, x = call(Tensor.dim, input), time_major(input, batch_first)
    settings = (hx, params, has_biases, num_layers, dropout, train, bidirectional)
    y, states = _layers(mode, x, _padded_layer, *settings)
    return from_time_major(y, rank, batch_first), *(joined_states(list(s), rank) for s in states)


def packed_recurrent(
    mode: str, data: Tensor, batch_sizes: Tensor, hx: State, params: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, ...]:
    """The same of a packed sequence.

    data: (entries, n), step by step; batch_sizes: (time,), how many sequences have a step, the longest first.
    hx, params, settings: as of `recurrent`, up to `bidirectional`.
    """
    y, states = _layers(mode, data, partial(_packed_layer, batch_sizes.tolist()), hx, params, *settings)
    return y, *(joined_states(list(s), 3) for s in states)


def _padded_layer(
    mode: str, x: Tensor, before: tuple, weights: tuple, backward: bool, cell: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction, or a cell, on (time, batch, n): its output and last states."""
    results = recurrent_layer(mode, torch.flip(x, (0,)) if backward else x, *(*before, *weights, cell))
    states = [results[i] for i in range(1, 3 if mode == "lstm" else 2)]
    return torch.flip(results[0], (0,)) if backward else results[0], states


def _packed_layer(
    sizes: list[int], mode: str, data: Tensor, before: tuple, weights: tuple, backward: bool
) -> tuple[Tensor, list[Tensor]]:
    """The same on a packed sequence. Steps that equally many sequences have are one piece, with as many rows of the states.

    sizes: how many sequences have each step, the longest first.
    """
    runs = [(size, len(list(steps))) for size, steps in groupby(sizes)]
    pieces = torch.split(data, [size * steps for size, steps in runs])
    order = list(zip(runs, pieces, strict=True))
    known = [state for state in before if state is not None]
    states = [state[:0] for state in known] if backward else known
    outputs, ended = list[Tensor](), list[list[Tensor]]()
    for (size, steps), piece in reversed(order) if backward else order:
        if backward:  # the sequences that end here begin
            states = [torch.cat([state, first[len(state) : size]]) for state, first in zip(states, known, strict=True)]
        else:
            ended.append([state[size:] for state in states])
            states = [state[:size] for state in states]
        x = piece.unflatten(0, (steps, size))
        y, states = _padded_layer(mode, x, (*states, None)[:2], weights, backward)
        outputs.append(y.flatten(0, 1))
    ended = [states, *reversed(ended)]
    return torch.cat(outputs[::-1] if backward else outputs), [torch.cat(kind) for kind in zip(*ended, strict=True)]


def _layers(
    mode: str, x: Tensor, run: Callable[..., tuple], hx: State, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool,
) -> tuple[Tensor, Iterator[tuple[Tensor, ...]]]:  # fmt: skip
    """All layers and directions, each by `run`: the last output, and the last states of each kind.

    run: (mode, input, states before, weights, whether backward) → (output, last states).
    """
    directions, states = 1 + bidirectional, list[list[Tensor]]()
    per_layer = len(params) // (num_layers * directions)
    h, c = _states(mode, hx)
    for layer in range(num_layers):
        if layer and dropout and train:
            x = F.dropout(x, dropout, True)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = list(params[index * per_layer : (index + 1) * per_layer])
            weight_ih, weight_hh = own[:2]
            bias_ih, bias_hh = own[2:4] if has_biases else (None, None)
            weight_hr = own[-1] if per_layer in (3, 5) else None
            size = call(Tensor.size, weight_hh, 1)
            before = zero_state(x, size) if h is None else state_of(h, index)
            cell = None
            if mode == "lstm":
                width = size if weight_hr is None else call(Tensor.size, weight_hr, 1)
                cell = zero_state(x, width) if c is None else state_of(c, index)
            weights = (weight_ih, bias_ih, weight_hh, bias_hh, weight_hr)
            y, last = run(mode, x, (before, cell), weights, bool(direction))
            outputs.append(y)
            states.append(last)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x, zip(*states, strict=True)


def _states(mode: str, hx: State) -> tuple[Tensor | None, Tensor | None]:
    """(h, c) of the state that a recurrent function gets; c of an LSTM only."""
    if hx is None:
        return None, None
    return (hx[0], hx[1]) if mode == "lstm" else (cast(Tensor, hx), None)


def _sequence(mode: str, input: Tensor, hx: State, params: Any, *settings: Any) -> tuple[Tensor, ...]:
    if isinstance(settings[0], (list, tuple)):  # of torch.lstm(data, batch_sizes, hx, params, ...)
        return packed_recurrent(mode, input, cast(Tensor, hx), cast(State, params), *settings)
    return recurrent(mode, input, hx, params, *settings)


for _mode, _original in {
    "lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu
}.items():  # fmt: skip
    decomposes(_original)(partial(_sequence, _mode))


@decomposes(nn.LSTM, nn.GRU, nn.RNN)
def recurrent_module(
    module: nn.RNNBase, input: Tensor | PackedSequence, hx: State = None
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """nn.LSTM, nn.GRU and nn.RNN without their shape checks."""
    if isinstance(input, PackedSequence):
        raise NotImplementedError(PACKED)
    params = [getattr(module, name) for name in module._flat_weights_names]
    settings = (
        module.bias,
        module.num_layers,
        module.dropout,
        module.training,
        module.bidirectional,
        module.batch_first,
    )
    mode = module.mode.lower()
    output, *states = recurrent(mode, input, hx, params, *settings)
    return output, tuple(states) if mode == "lstm" else states[0]


def _cell(
    mode: str,
    input: Tensor,
    hx: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """A cell, (batch, n) or (n,), as a layer on a sequence of one step."""
    params = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    h, c = (None if state is None else state.unsqueeze(0) for state in _states(mode, hx))
    before = h if h is None or c is None else (h, c)
    x = input.unsqueeze(0)
    rank, run = call(Tensor.dim, x), partial(_padded_layer, cell=True)
    settings = (before, params, b_ih is not None, 1, 0.0, False, False)
    _, states = _layers(mode, time_major(x, False), run, *settings)
    after = tuple(joined_states(list(s), rank).squeeze(0) for s in states)
    return after if mode == "lstm" else after[0]


for _mode, _original in {
    "lstm": torch.lstm_cell, "gru": torch.gru_cell, "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell
}.items():  # fmt: skip
    decomposes(_original)(partial(_cell, _mode))


@decomposes(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def cell_module(module: Cell, input: Tensor, hx: State = None) -> Tensor | tuple[Tensor, ...]:
    """nn.LSTMCell, nn.GRUCell and nn.RNNCell without their shape checks."""
    kind = getattr(module, "nonlinearity", None)
    mode = f"rnn_{kind}" if kind else "lstm" if isinstance(module, nn.LSTMCell) else "gru"
    return _cell(mode, input, hx, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
