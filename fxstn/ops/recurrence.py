"""The tangent of a recurrent layer: what enters the gates, and then a linear recurrence through time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.complex_numbers import conjugate
from fxstn.ops.precision import without_autocast
from fxstn.ops.recurrent import Steps


@staged
def entering(by_input: Tensor, by_hidden: Tensor, dx: Tensor | None, dv: Tensor | None) -> Tensor:
    """What changes of the two products give to each gate.

    by_input, by_hidden: of `Steps`.
    dx, dv: (time, batch, gates · n), changes of the product with the input, and with h; None where there is none.

    Returns (time, batch, gates, n).
    """
    terms = [gain * d.view_as(gain) for gain, d in ((by_input, dx), (by_hidden, dv)) if d is not None]
    return terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else torch.zeros_like(by_input)


class _Recurrence(torch.autograd.Function):
    """The tangent of a layer, a linear recurrence whose coefficients are constants: state ← carry · state + Σ gates.

    Each gate is entering + by_hidden · (weight_hh dh); dh is the state or, of an LSTM, output · state + the last gate.
    """

    @staticmethod
    def forward(ctx: Any, entering: Tensor, dh: Tensor, dc: Tensor, projected: Tensor | None, by_hidden: Tensor,
                carry: Tensor | None,
                output: Tensor | None, weight_hh: Tensor, weight_hr: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(by_hidden, carry, output, weight_hh, weight_hr)
        return recurrence(entering, dh, dc, projected, by_hidden, carry, output, weight_hh, weight_hr)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dc: Tensor) -> Any:
        return *_adjoint(dy, dc, *map(conjugate, ctx.saved_tensors)), *[None] * 5


@staged(closed=True)
def _adjoint(
    dy: Tensor, dc: Tensor, by_hidden: Tensor, carry: Tensor | None, output: Tensor | None, weight: Tensor,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients in the first four arguments of `recurrence`, from those of its results."""
    gates, entering = by_hidden.shape[-2], torch.empty_like(by_hidden)
    inner = gates - (output is not None)
    dh, projected = torch.zeros_like(dy[0]), torch.empty_like(dy) if projection is not None else None
    for t in reversed(range(len(dy))):
        dh = dh + dy[t]
        if projected is not None and projection is not None:
            projected[t] = dh
            dh = dh @ projection
        dc = dc + dh if output is None else torch.addcmul(dc, output[t], dh)
        if output is not None:
            entering[t, :, -1] = dh
        entering[t, :, :inner] = dc.unsqueeze(-2)
        dh = (by_hidden[t] * entering[t]).flatten(-2) @ weight
        dc = torch.zeros_like(dc) if carry is None else carry[t] * dc
    return entering, dh, dc, projected


@staged(closed=True)
def recurrence(entering: Tensor, dh: Tensor, dc: Tensor, projected: Tensor | None, by_hidden: Tensor, carry: Tensor | None,
               output: Tensor | None, weight_hh: Tensor, weight_hr: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence of `_Recurrence`.

    entering, by_hidden: (time, batch, gates, n).
    dh, dc: (batch, n), of the state before.
    projected: (time, batch, n), what the tangent of the projection gives to dh.
    carry, output: (time, batch, n), or None, as of `Steps`.

    Returns dh of every step, (time, batch, n), and the last state.
    """
    gates, outputs, weight = by_hidden.shape[-2], [], weight_hh.t()
    inner = gates - (output is not None)
    for t in range(len(entering)):
        gate = torch.addcmul(entering[t], by_hidden[t], (dh @ weight).view_as(entering[t]))
        total = gate[:, 0] if inner == 1 else gate[:, :inner].sum(-2)
        dc = total if carry is None else torch.addcmul(total, carry[t], dc)
        dh = dc if output is None else torch.addcmul(gate[:, -1], output[t], dc)
        if weight_hr is not None:
            dh = dh @ weight_hr.t()
            dh = dh if projected is None else dh + projected[t]
        outputs.append(dh)
    return torch.stack(outputs), dc


@staged
def recurrence_tangent(
    mode: str, entering: Tensor, dh: Tensor | None, dc: Tensor | None, projected: Tensor | None, trace: Steps,
    weight_hh: Tensor, weight_hr: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Tangents of the results of `recurrent_layer`.

    entering: (time, batch, gates, n), tangent of what enters the gates: see `entering`.
    dh, dc: (batch, n), tangents of the state before; None stands for zero.
    projected: (time, batch, n), what the tangent of the projection gives to that of h; None without one.
    trace: what the layer did.
    """
    lstm = mode == "lstm"
    dtype = entering.dtype
    dh = torch.zeros_like(trace.previous[0], dtype=dtype) if dh is None else dh.to(dtype)
    if lstm:
        state = entering.new_zeros(entering[0, :, 0].shape) if dc is None else dc.to(dtype)
    else:
        state = dh.clone() if torch.compiler.is_compiling() else dh  # torch.compile refuses one tensor as two arguments
    coefficients = (trace.by_hidden, trace.carry, trace.output)
    weights = [w if w is None else w.to(dtype) for w in (weight_hh, weight_hr)]
    constant = not any(value is not None and value.requires_grad for value in (*coefficients, *weights))
    run: Callable[..., tuple[Tensor, Tensor]] = _Recurrence.apply if constant else recurrence
    projected = projected if projected is None else projected.to(dtype)
    with without_autocast(entering.device.type):  # the adjoint, too, has products of one type
        dy, last = run(entering, dh, state, projected, *coefficients, *weights)
    return (dy, dy[-1], last) if lstm else (dy, dy[-1])
