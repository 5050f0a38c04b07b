"""Weights respond however a forward spells their product with activations, and wherever it adds or multiplies them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import randomize_response
from torch import nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.tools.verify import relative_error

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class Net(nn.Module):
    """A forward over a few parameters. run: (network, input) → output; shapes: of the parameters by name."""

    def __init__(self, run, **shapes):
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            dtype = torch.complex64 if name.startswith("complex") else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype) / 2))

    def forward(self, x):
        return self.run(self, x)


X = torch.randn(4, 6)  # examples, features
SEQUENCE = torch.randn(4, 5, 6)
# name: (forward, input, shapes of the parameters). All of them respond, to one perturbation per example, too.
SPELLINGS = {
    "matmul": (lambda n, x: torch.tanh(x @ n.w), X, {"w": (6, 3)}),
    "matmul-transposed": (lambda n, x: torch.tanh(x @ n.w.T), X, {"w": (3, 6)}),
    "matmul-sequence": (lambda n, x: torch.tanh(x @ n.w) @ n.v.t(), SEQUENCE, {"w": (6, 3), "v": (2, 3)}),
    "matmul-left": (lambda n, x: torch.tanh(n.w @ x), SEQUENCE, {"w": (3, 5)}),
    "matmul-vector": (lambda n, x: torch.tanh(x @ n.w), SEQUENCE, {"w": (6,)}),
    "matmul-stacked": (lambda n, x: torch.tanh(x[:, None] @ n.w).sum(1), SEQUENCE, {"w": (3, 6, 2)}),
    "mm": (lambda n, x: torch.mm(x, n.w), X, {"w": (6, 3)}),
    "addmm": (lambda n, x: torch.tanh(torch.addmm(n.b, x, n.w)), X, {"w": (6, 3), "b": (3,)}),
    "addmm-scales": (lambda n, x: torch.addmm(n.b, x, n.w, beta=0.5, alpha=2), X, {"w": (6, 3), "b": (3,)}),
    "mv": (lambda n, x: torch.mv(x, n.w), X, {"w": (6,)}),
    "linear-vector": (lambda n, x: F.linear(x, n.w), X, {"w": (6,)}),
    "bmm-stacked": (
        lambda n, x: torch.bmm(x.expand(3, -1, -1), n.w).sum(0), X, {"w": (3, 6, 2)},
    ),
    "baddbmm": (
        lambda n, x: torch.baddbmm(n.b, x.unsqueeze(0).expand(3, -1, -1), n.w).sum(0), X, {"w": (3, 6, 2), "b": (3, 1, 2)},
    ),
    "einsum": (lambda n, x: torch.einsum("bti,oi->bto", x, n.w), SEQUENCE, {"w": (3, 6)}),
    "einsum-heads": (lambda n, x: torch.einsum("btd,dhk->bhtk", x, n.w), SEQUENCE, {"w": (6, 2, 3)}),
    "einsum-ellipsis": (lambda n, x: torch.einsum("...i,io->...o", x, n.w), SEQUENCE, {"w": (6, 3)}),
    "einsum-batch-last": (lambda n, x: torch.einsum("oi,bti->otb", n.w, x).permute(2, 0, 1), SEQUENCE, {"w": (3, 6)}),
    "einsum-implicit": (lambda n, x: torch.einsum("bi,io", x, n.w), X, {"w": (6, 3)}),
    "einsum-summed": (lambda n, x: torch.einsum("bi,io->b", x, n.w), X, {"w": (6, 3)}),
    "einsum-two-weights": (lambda n, x: torch.einsum("bi,ir,ro->bo", x, n.a, n.b), X, {"a": (6, 2), "b": (2, 3)}),
    "tensordot": (lambda n, x: torch.tensordot(x, n.w, dims=1), SEQUENCE, {"w": (6, 3)}),
    "tensordot-axes": (lambda n, x: torch.tensordot(x, n.w, dims=([2, 1], [1, 0])), SEQUENCE, {"w": (5, 6, 3)}),
    "inner": (lambda n, x: torch.inner(x, n.w), SEQUENCE, {"w": (3, 6)}),
    "complex": (
        lambda n, x: torch.fft.irfft(torch.einsum("bfi,io->bfo", torch.fft.rfft(x, dim=1), n.complex_w), n=5, dim=1),
        SEQUENCE, {"complex_w": (6, 3)},
    ),
    "complex-filter": (
        lambda n, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * n.complex_w, n=5, dim=1), SEQUENCE, {"complex_w": (3, 6)},
    ),
}  # fmt: skip


def law_1(net, x, **options):
    """(network, relative error of dy for one delta, dy) in float64, at weights and responses away from their starts."""
    net, x = net.double() if not any(p.is_complex() for p in net.parameters()) else in_double(net), double(x)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, **options).eval()
    randomize_response(stn)
    delta = torch.randn(1, dtype=torch.float64)
    moved = lambda step: functional_call(net, stn.best_response(step * delta), (x,))  # noqa: E731
    _, dy = stn.pushforward(x, delta=delta)
    return stn, relative_error(dy, moved, 1e-7)


def double(x):
    return x.double() if x.is_floating_point() else x


def in_double(net):
    for parameter in net.parameters():
        parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
    return net


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_weight_responds_however_its_product_is_spelled(name):
    run, x, shapes = SPELLINGS[name]
    stn, error = law_1(Net(run, **shapes), x)
    assert stn.best_response(torch.zeros(1)).keys() == shapes.keys()
    assert set(responding(stn)) == shapes.keys()
    assert error < 1e-6
    x, delta = double(x), torch.randn(len(x), 1, dtype=torch.float64)
    assert stn.per_example(x)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(len(x)):
        torch.testing.assert_close(rows[i], stn.pushforward(x, delta=delta[i])[1][i], rtol=1e-9, atol=1e-12)


def responding(stn):
    return [name for name, module in stn.response.named_modules() if type(module).__name__ == "Response"]
