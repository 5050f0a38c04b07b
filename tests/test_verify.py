"""verify: an independent witness on every frontend, for modules and parameters under several names and for constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.inputs import Inputs
from fxstn.tools.reference import Reference
from fxstn.tools.verify import Check, VerifyResult

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class SharedModules(nn.Module):
    """A layer, a norm and a dropout, each at two attribute paths; the second layer is called at its second path only."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop, self.late = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6)
        self.b, self.bn2, self.drop2, self.head = self.a, self.bn, self.drop, self.late

    def forward(self, x):
        return self.head(self.drop2(torch.tanh(self.bn2(self.b(self.drop(torch.tanh(self.bn(self.a(x)))))))))


class SharedTensors(nn.Module):
    """A weight, a bias and a buffer, each of two modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.bias = self.a.weight, self.a.bias
        self.register_buffer("scale", torch.rand(6))
        self.b.register_buffer("scale", self.scale)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) * self.scale + self.bias * self.b.scale


class SharedBlocks(nn.Module):
    """One block three times in a list, and once more beside it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2))] * 3)
        self.head = self.blocks[0]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("specs", [SCALAR, None, [hp.WeightDecay()], [hp.Dropout("input")]], ids=str)
@pytest.mark.parametrize("make", [SharedModules, SharedTensors, SharedBlocks])
def test_what_has_several_names_is_one_thing(make, specs, trace):
    x = torch.randn(5, 6)
    report = fxstn.verify(make(), x, hparams=specs, trace=trace)
    assert report.frontend == trace
    assert report.ok, str(report)
    assert fxstn.explain(make(), specs, x).ok


def without_gradients(net, x):
    h = net.a(x)
    with torch.no_grad():
        gate = torch.tanh(net.b(h))
    return h * gate


def written_without_gradients(net, x):
    gate = torch.empty(len(x), 6)
    with torch.no_grad():
        gate[1:] = net.b(x)[1:]
        gate[:1] = 0.5
    return net.a(x) * gate


CONSTANTS = {
    "detach": (lambda net, x: net.a(x) * net.b(x).detach(), ("fx", "export", "live")),
    "straight through": (
        lambda net, x: net.a(x).softmax(1) + net.b(x) - net.b(x).detach(),
        ("fx", "export", "live"),
    ),
    "straight through within a function": (
        lambda net, x: net.b(F.gumbel_softmax(net.a(x), hard=True)),
        ("fx", "live"),
    ),
    "data": (lambda net, x: net.a(x) * net.b(x).data.tanh(), ("fx", "live")),
    "no_grad": (without_gradients, ("export", "live")),
    "written in no_grad": (written_without_gradients, ("live",)),
}


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.body = nn.Linear(6, 6), nn.Linear(6, 6), body

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(("name", "trace"), [(name, trace) for name in CONSTANTS for trace in CONSTANTS[name][1]])
def test_what_autograd_takes_for_constant_is_constant_for_the_witness(name, trace):
    report = fxstn.verify(Net(CONSTANTS[name][0]), torch.randn(5, 6), hparams=SCALAR, trace=trace)
    assert report.ok, str(report)


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_the_witness_draws_what_the_network_draws(trace):
    """The same forward, draw by draw: with the weights where they are, the reference gives the network's output."""

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.channels = nn.Linear(6, 6), nn.Dropout(0.3), nn.Dropout1d(0.2)
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.1, batch_first=True)
            self.rnn, self.alpha = nn.LSTM(6, 6, 2, dropout=0.4, batch_first=True), nn.AlphaDropout(0.2)

        def forward(self, x):
            x = self.channels(self.layer(self.drop(self.a(x)))) + torch.rand_like(x)
            return F.dropout(self.alpha(self.rnn(x)[0]), 0.1)

    torch.manual_seed(0)
    model, x = Drawing().double(), torch.randn(3, 4, 6).double()
    stn = fxstn.transform(model, [hp.Dropout("drop"), hp.Dropout("alpha")], example_inputs=x, trace=trace)
    for training in (True, False):
        torch.manual_seed(5)
        expected = stn.graph("train" if training else "eval")(x)
        reference = Reference(model, stn, Inputs((x,), {}), torch.ones(2).double(), 5, training)
        torch.testing.assert_close(reference(0.0), expected.flatten())


def test_a_kernel_that_draws_nothing_is_not_replaced_by_its_decomposition(monkeypatch):
    """A decomposition that computes something else is found, because the witness runs torch's own kernel."""
    original = DECOMPOSITIONS[torch._VF.lstm]
    net = nn.LSTM(6, 6, batch_first=True)
    assert fxstn.verify(net, torch.randn(3, 4, 6), hparams=SCALAR, trace="live").ok

    def wrong(*args):
        output, *states = original(*args)
        return output * output, *states

    monkeypatch.setitem(DECOMPOSITIONS, torch._VF.lstm, wrong)
    assert not fxstn.verify(net, torch.randn(3, 4, 6), hparams=SCALAR, trace="live").ok


def test_the_table_says_which_rows_were_repeated():
    rows = [Check("train", "original model", seed, error) for seed, error in enumerate([1e-2, 3e-9])]
    text = str(VerifyResult(1e-6, rows, "export")).splitlines()
    assert text[2].endswith("above the tolerance, repeated at another point")
    assert text[3].endswith("ok")
    assert text[-1] == "ok: largest error 3.0e-09, tolerance 1e-06, followed by trace='export'"
    text = str(VerifyResult(1e-6, rows[:1])).splitlines()
    assert text[2].endswith("above the tolerance")
    assert text[-1].startswith("NOT ok: largest error 1.0e-02")


class FourierLayer(nn.Module):
    """Channels mixed frequency by frequency, with complex weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(6, 6, 4, dtype=torch.complex64))
        self.head, self.dropout = nn.Linear(6, 3), nn.Dropout(0.2)

    def forward(self, x):
        modes = torch.einsum("bif,iof->bof", torch.fft.rfft(x), self.weight)
        return self.head(self.dropout(torch.fft.irfft(modes, n=x.shape[-1])).mean(-1))


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_complex_weights_are_compared_in_double_precision(trace):
    result = fxstn.verify(FourierLayer(), torch.randn(4, 6, 6), trace=trace)
    assert result.ok
    assert result.max_error < 1e-7
    assert (result.coverage.responding, result.coverage.possible) == (2, 2)


def test_only_what_has_no_response_is_left_out(monkeypatch):
    """A scale of weights before a batch norm changes nothing. Any other error of the default response is one of verify."""
    x, scaled_away = torch.randn(5, 6), nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, affine=False))
    with pytest.raises(ValueError, match="no parameter can respond"):
        fxstn.transform(scaled_away, SCALAR, example_inputs=x)
    assert fxstn.verify(scaled_away, x, hparams=SCALAR).ok

    def fails(*args, response, **settings):
        if response == "scaled":
            raise ValueError("of the default response")
        return fxstn.transform(*args, response=response, **settings)

    monkeypatch.setattr("fxstn.tools.verify.transform", fails)
    with pytest.raises(ValueError, match="of the default response"):
        fxstn.verify(nn.Linear(6, 6), x, hparams=SCALAR)


class InitialState(nn.Module):
    """A state as everybody writes it, and a result that is filled in."""

    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        h = self.cells(x, torch.zeros(1, x.size(0), 5))[0]
        result = torch.zeros(x.size(0), x.size(1), 7)
        result[..., :5] = h
        return self.out(result[..., :5] @ torch.ones(5, 5).tril())


def test_tensors_of_no_named_type_are_float64_like_the_rest():
    before = torch.get_default_dtype()
    result = fxstn.verify(InitialState(), torch.randn(4, 3, 6))
    assert result.ok
    assert result.max_error < 1e-7
    assert torch.get_default_dtype() is before
