"""Responses of parameters that are sliced, joined, normalised, tied, looked up or transposed before a layer reads them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import fxstn
from fxstn import hp
from fxstn.ir.tangents import WHOLE
from tests.nets import randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class FusedStandardized(nn.Conv2d):
    """Weight standardisation by batch norm over the rows."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(var + 1e-5), self.bias)


class Slices(nn.Module):
    """One weight read in thirds and whole; a bias joined from two parameters and a constant."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12))
        self.q, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("zeros", torch.zeros(4))

    def forward(self, x):
        a, b, c = self.weight.chunk(3)
        p, q, r = self.bias.chunk(3)
        x = F.linear(x, a, p) * torch.tanh(F.linear(x, b, q)) + F.linear(x, c, r)
        return F.linear(x, self.weight, torch.cat([self.q, self.zeros, self.v]))


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight: its columns are scaled."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.table(tokens))))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(10, 6, mode="sum"), nn.Linear(6, 2)

    def forward(self, tokens):
        return self.head(torch.tanh(self.bag(tokens)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.last = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.ConvTranspose2d(6, 3, 2)
        self.pair = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        x = torch.tanh(self.last(torch.tanh(self.up(x)))).mean((2, 3))
        return self.pair(x, torch.sin(x))


def convolutions(layer):
    return lambda: nn.Sequential(layer(3, 4, 3), nn.Tanh(), layer(4, 5, 3))


IMAGES, TOKENS = torch.randn(4, 3, 8, 8), torch.randint(10, (4, 5))
NETS = {
    "standardised": (convolutions(Standardized), IMAGES),
    "standardised-fused": (convolutions(FusedStandardized), IMAGES),
    "weight-norm": (convolutions(lambda *sizes: weight_norm(nn.Conv2d(*sizes))), IMAGES),
    "slices": (Slices, torch.randn(4, 4)),
    "tied": (Tied, TOKENS),
    "bag": (Bag, TOKENS),
    "transposed": (Transposed, torch.randn(4, 4, 6, 6)),
}


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_responds_and_the_tangent_is_exact(name):
    make, x = NETS[name]
    net = make()
    stn = fxstn.transform(net, SCALAR, response="structured")
    assert {n.removesuffix(".R") for n, _ in stn.response.named_parameters() if n.endswith(".R")} == dict(
        net.named_parameters()
    ).keys()
    report = fxstn.verify(net, x, hparams=SCALAR)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", NETS)
def test_rows_of_a_per_example_delta_are_the_shared_results(name):
    make, x = NETS[name]
    stn = fxstn.transform(make().double(), SCALAR).eval()
    randomize_response(stn)
    x = x.double() if x.is_floating_point() else x
    delta = torch.randn(4, 1).double()
    assert stn.per_example(x)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(4):
        torch.testing.assert_close(rows[i], stn.pushforward(x, delta=delta[i])[1][i], rtol=1e-9, atol=1e-12)


def test_parameters_of_one_weight_share_their_scales():
    stn = fxstn.transform(nn.Sequential(weight_norm(nn.Linear(3, 4))), SCALAR, response="structured")
    direction, length = stn.response.get_submodule("0.parametrizations.weight").children()
    assert direction.block == length.block
    assert direction.U.data_ptr() == length.U.data_ptr()
    assert direction.R.shape != length.R.shape


@pytest.mark.parametrize("method", ["centered", "stn"])
def test_a_weight_that_is_computed_moves_by_a_finite_step(method):
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    stn = fxstn.transform(net, SCALAR, method=method).eval()
    randomize_response(stn)
    x, delta = torch.randn(5, 3).double(), torch.tensor([0.7]).double()
    moved = delta + stn.hparams.unconstrained.detach() if method == "stn" else delta
    expected = functional_call(net, stn.best_response(moved), (x,))
    torch.testing.assert_close(stn.perturbed_output(x, delta=delta)[0], expected)
    with pytest.warns(UserWarning, match="one ε for the whole batch"):
        assert not stn.per_example(x)
    with pytest.raises(ValueError, match="which is computed"):
        stn.perturbed_output(x, delta=torch.randn(5, 1))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.linear(x, self.mix @ self.a.weight, self.a.bias))


def test_the_factors_of_a_weight_are_scaled_along_its_rows_and_its_columns():
    stn = fxstn.transform(Mixed(), SCALAR, response="structured")
    assert [stn.response.get_submodule(name).axis for name in ("mix", "a.weight")] == [0, 1]
    report = fxstn.verify(Mixed(), torch.randn(3, 4), hparams=SCALAR)
    assert report.ok, str(report)


class Inverted(Mixed):
    def forward(self, x):
        return self.b(F.linear(x, torch.linalg.inv(self.mix), self.a.bias))


def test_a_weight_of_which_every_axis_is_mixed_has_one_scale():
    stn = fxstn.transform(Inverted().double(), SCALAR).eval()
    assert (stn.response.mix.axis, len(stn.response.mix.U)) == (WHOLE, 1)
    randomize_response(stn)
    x, delta = torch.randn(3, 4).double(), torch.randn(3, 1).double()
    assert stn.per_example(x)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(3):
        moved = functional_call(stn.model, stn.best_response(1e-6 * delta[i]), (x,)) - stn.model(x)
        torch.testing.assert_close(rows[i], moved[i] * 1e6, rtol=1e-4, atol=1e-6)


def test_a_weight_that_no_rule_follows_gets_no_response():
    class Distances(Mixed):
        def forward(self, x):
            return self.b(F.linear(x, torch.pdist(self.mix)[:4].expand(4, 4), self.a.bias))

    with pytest.warns(UserWarning, match="1 of 2 weights responds"):
        stn = fxstn.transform(Distances(), SCALAR)
    assert not hasattr(stn.response, "mix")
    assert "read by torch.pdist" in str(fxstn.explain(Distances(), SCALAR))


def test_parameters_before_an_operation_without_a_rule_stay_as_they_are():
    class Before(Mixed):
        def forward(self, x):
            return self.b(
                F.embedding_bag((x + self.mix[0]).argsort(), self.a.weight) + torch.pdist(x + self.mix[0])[:4]
            )

    stn = fxstn.transform(Before(), SCALAR)
    assert not hasattr(stn.response, "mix")
    assert stn.response.b.weight.axis == 0
