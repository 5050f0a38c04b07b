"""Cells of recurrent networks under autocast on the CPU: their states have the values and the types of the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxstn
from fxstn import hp
from fxstn.ops.recurrent import steps

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Walk(nn.Module):
    """Steps of a cell over time, behind a layer that autocast lowers or not.

    Returns the states after the last step.
    """

    def __init__(self, kind: str, lowered: bool) -> None:
        super().__init__()
        self.enter, self.cell = nn.Linear(3, 4) if lowered else nn.Identity(), CELLS[kind](4 if lowered else 3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state = None
        for t in range(2):
            state = self.cell(self.enter(x[:, t]), state)
        return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowered", [False, True], ids=["float32", "lowered"])
@pytest.mark.parametrize(
    ("trace", "kind"), [("export", "lstm"), *((trace, kind) for trace in ("fx", "live") for kind in CELLS)]
)
def test_the_states_of_a_cell_are_those_of_the_plain_model(trace, kind, lowered, precision):
    torch.manual_seed(0)
    model, x = Walk(kind, lowered), torch.randn(4, 2, 3)
    stn = fxstn.transform(model, [hp.Scalar("unused", 0.5, 0.0, 1.0)], example_inputs=x, trace=trace).train()
    with torch.autocast("cpu", precision):
        expected, states = model(x), stn(x)
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


def test_the_tangent_keeps_the_type_of_a_given_state():
    """A cell state in bfloat16 would lose what a long sequence adds to it."""
    products, weight = torch.zeros(1, 2, 20).bfloat16(), torch.zeros(20, 5)
    c = torch.full((2, 5), 1.0 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, after = steps("lstm", products, torch.zeros(2, 5), c, weight, None, None).results
    torch.testing.assert_close(after, c / 2, rtol=0, atol=0)
