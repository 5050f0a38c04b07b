"""Weights respond however a forward spells their product with activations, and wherever it adds or multiplies them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.tools.verify import relative_error
from tests.nets import randomize_response

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


def sequence_of_states(n, x):
    """A state-space model: x_t by element-wise products with parameters."""
    h, step, outputs = torch.zeros(x.shape[0], 6, 3, dtype=x.dtype), F.softplus(x @ n.dt), []
    decay = -torch.exp(n.a)
    for i in range(3):
        h = torch.exp(step[:, i, :, None] * decay) * h + (step[:, i] * x[:, i])[..., None] * (x[:, i] @ n.b)[:, None]
        outputs.append((h * n.c).sum(-1) + n.d * x[:, i])
    return torch.stack(outputs, 1)


def cell(n, x):
    h = n.h0.expand(x.shape[0], -1)
    for i in range(3):
        h = torch.tanh(torch.addmm(n.b, x[:, i], n.wi) + h @ n.wh)
    return h


def with_relative_bias(n, x):
    q, k = (x.view(4, 5, 2, 3) * n.gain).transpose(1, 2), x.view(4, 5, 2, 3).transpose(1, 2)
    bias = n.table[(torch.arange(5)[:, None] - torch.arange(5) + 4).view(-1)].view(5, 5, 2).permute(2, 0, 1)
    return torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ k + F.scaled_dot_product_attention(
        q, k, k, attn_mask=bias
    )


def masked(n, x):
    mask = torch.tensor([True, False, True, False, False])[:, None]
    return torch.where(mask, n.token, torch.tanh(x)) + torch.tanh(x * n.gain) * n.other * mask


# Weights computed from parameters, and parameters that are added, multiplied or looked up.
VALUES = {
    "low-rank": (
        lambda n, x: F.linear(x, n.w + 0.5 * n.b @ n.a, n.bias), X, {"w": (3, 6), "b": (3, 2), "a": (2, 6), "bias": (3,)},
    ),
    "delta": (lambda n, x: F.linear(x, n.w + n.delta), X, {"w": (3, 6), "delta": (3, 6)}),
    "symmetric": (lambda n, x: F.linear(x, n.w.triu() + n.w.triu(1).mT), X, {"w": (6, 6)}),
    "normalised": (lambda n, x: F.linear(x, F.normalize(n.w, dim=1)), X, {"w": (3, 6)}),
    "normalised-columns": (lambda n, x: F.linear(x, F.normalize(n.w, dim=0)), X, {"w": (3, 6)}),
    "spectral": (lambda n, x: F.linear(x, n.w / torch.linalg.matrix_norm(n.w)), X, {"w": (3, 6)}),
    "exponential": (lambda n, x: x @ torch.matrix_exp(n.w - n.w.T), X, {"w": (6, 6)}),
    "masked-weight": (lambda n, x: F.linear(x, n.w * torch.ones(3, 6).tril()), X, {"w": (3, 6)}),
    "convolved": (lambda n, x: F.conv1d(x, torch.softmax(n.w, -1), n.b), SEQUENCE, {"w": (3, 5, 2), "b": (3,)}),
    "bias-of-its-size": (  # position biases of a grid as large as the input
        lambda n, x: x + n.table[: x.shape[1] // 2].reshape(-1, n.table.shape[1]).repeat(3, 1)[: x.shape[1]], SEQUENCE,
        {"table": (9, 6)},
    ),
    "experts": (
        lambda n, x: torch.einsum("be,beo->bo", torch.softmax(x @ n.gate, -1), torch.einsum("bi,eio->beo", x, n.w)),
        X, {"w": (3, 6, 2), "gate": (6, 3)},
    ),
    "codebook": (lambda n, x: torch.softmax(-((x[:, None] - n.c) ** 2).sum(-1), -1) @ n.c, X, {"c": (7, 6)}),
    "codebook-distances": (lambda n, x: torch.cdist(x, n.c), X, {"c": (7, 6)}),
    "states": (sequence_of_states, SEQUENCE, {"a": (6, 3), "b": (6, 3), "c": (6, 3), "d": (6,), "dt": (6, 6)}),
    "cell": (cell, SEQUENCE, {"wi": (6, 4), "wh": (4, 4), "b": (4,), "h0": (4,)}),
    "class-token": (
        lambda n, x: torch.tanh(torch.cat([n.token.expand(x.shape[0], -1, -1), x], 1) + n.position) @ n.w,
        SEQUENCE, {"token": (1, 1, 6), "position": (1, 6, 6), "w": (6, 2)},
    ),
    "positions": (
        lambda n, x: F.layer_norm(x + F.embedding(torch.arange(x.shape[1]), n.table), (6,)), SEQUENCE, {"table": (9, 6)},
    ),
    "relative-bias": (with_relative_bias, SEQUENCE, {"table": (9, 2), "gain": (3,)}),
    "tokens-in-place-of-masked": (masked, SEQUENCE, {"token": (6,), "gain": (1, 1, 6), "other": (1, 1, 6)}),
    "layer-scale": (lambda n, x: x + n.gamma * torch.tanh(x), torch.randn(4, 3, 2, 2), {"gamma": (3, 1, 1)}),
    "global-response": (
        lambda n, x: n.gamma * (x * x.norm(dim=(1, 2), keepdim=True)) + n.beta, torch.randn(4, 2, 2, 3),
        {"gamma": (1, 1, 1, 3), "beta": (1, 1, 1, 3)},
    ),
    "slope": (lambda n, x: F.prelu(x, n.a) + torch.sin(n.b * x) ** 2 / n.b, SEQUENCE, {"a": (5,), "b": (1, 5, 1)}),
    "temperature": (lambda n, x: torch.tanh(x) * n.t.exp() / n.u, X, {"t": (), "u": (1,)}),
    "power": (lambda n, x: x.abs().clamp(min=0.1) ** n.p, X, {"p": (1,)}),
}  # fmt: skip

SCALE_FREE = {"normalised", "normalised-columns", "spectral"}  # where a weight that is only scaled stays as it is


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


@pytest.mark.parametrize("name", [*SPELLINGS, *VALUES])
def test_every_parameter_responds_however_it_is_read(name):
    run, x, shapes = (SPELLINGS | VALUES)[name]
    stn, error = law_1(Net(run, **shapes), x, response="structured" if name in SCALE_FREE else "scaled")
    assert set(responding(stn)) == shapes.keys()
    assert error < 1e-6
    x, delta = double(x), torch.randn(len(x), 1, dtype=torch.float64)
    assert stn.per_example(x)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(len(x)):
        torch.testing.assert_close(rows[i], stn.pushforward(x, delta=delta[i])[1][i], rtol=1e-9, atol=1e-12)


def responding(stn):
    return [name for name, module in stn.response.named_modules() if type(module).__name__ == "Response"]


def together(n, x):
    """Several spellings in one network."""
    x = torch.cat([n.token.expand(x.shape[0], -1, -1), x], 1) + n.position
    x = x + n.scale * torch.tanh(torch.addmm(n.bias, x.reshape(-1, 6), n.w).view(x.shape[0], -1, 6))
    x = torch.tanh(F.linear(x, n.v + n.b @ n.a)) + torch.einsum("bti,eio->bto", x, n.experts)
    return (x @ torch.matrix_exp(n.q - n.q.T)).mean(1)


SHAPES = {"token": (1, 1, 6), "position": (6, 6), "scale": (6,), "w": (6, 6), "bias": (6,), "v": (3, 6), "b": (3, 2),
          "a": (2, 6), "experts": (2, 6, 3), "q": (3, 3)}  # fmt: skip


@pytest.mark.parametrize("method", ["centered", "stn"])
def test_a_finite_step_of_weights_in_any_spelling_is_that_of_the_original(method):
    net = Net(together, **SHAPES).double()
    stn = fxstn.transform(net, SCALAR, method=method).eval()
    randomize_response(stn)
    assert set(responding(stn)) == SHAPES.keys()
    x, delta = SEQUENCE.double(), torch.tensor([0.7]).double()
    moved = delta + stn.hparams.unconstrained.detach() if method == "stn" else delta
    expected = functional_call(net, stn.best_response(moved), (x,))
    torch.testing.assert_close(stn.perturbed_output(x, delta=delta)[0], expected)


@pytest.mark.parametrize("settings", [{"recompute": True}, {"response": "structured"}, {"trace": "live"}])
def test_weights_in_any_spelling_respond_in_every_setting(settings):
    stn, error = law_1(Net(together, **SHAPES), SEQUENCE, **settings)
    assert error < 1e-6
    x, delta = SEQUENCE.double(), torch.randn(1).double()
    y, dy = stn.pushforward(x, delta=delta)
    torch.testing.assert_close(stn.perturbed_output(x, delta=delta)[0], y + dy)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            stn.float().pushforward(SEQUENCE, delta=delta.float())[1].double(), dy, rtol=0.1, atol=0.1
        )


def test_weight_decay_matches_weights_in_any_spelling():
    stn = fxstn.transform(Net(together, **SHAPES), [hp.WeightDecay("*")])
    assert {name for name, *_ in stn.terms.penalties} == {"w", "v", "b", "a", "experts"}
