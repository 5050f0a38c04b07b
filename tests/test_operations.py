"""Operations that torch hands on incompletely, or that have conventions of their own: in networks, against the original."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from tests.nets import randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]
WEIGHTED = pytest.mark.skipif(
    "weight" not in inspect.signature(F.l1_loss).parameters, reason="this version of torch has no weight there"
)


class Errors(nn.Module):
    """Weighted absolute errors, with the weight by name or by position."""

    def __init__(self, reduction, by_name=True):
        super().__init__()
        self.layer, self.reduction, self.by_name = nn.Linear(4, 3), reduction, by_name
        self.register_buffer("target", torch.randn(3))
        self.register_buffer("weight", torch.rand(3) + 0.2)

    def forward(self, x):
        y = self.layer(x)
        target, weight = self.target.expand_as(y), self.weight.expand_as(y)
        if self.by_name:
            return F.l1_loss(y, target, reduction=self.reduction, weight=weight)
        return F.l1_loss(y, target, None, None, self.reduction, weight)


@WEIGHTED
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_absolute_errors_keep_their_weight(trace, reduction, by_name):
    torch.manual_seed(0)
    model, x = Errors(reduction, by_name).double(), torch.randn(5, 4, dtype=torch.float64)
    stn = fxstn.transform(model, SCALAR, example_inputs=x, trace=trace)
    assert stn.frontend == trace
    torch.testing.assert_close(stn(x), model(x))
    randomize_response(stn)
    delta = torch.ones(1, dtype=torch.float64)
    moved_by = stn.best_response(delta)
    primal = dict(model.named_parameters())

    def moved(step):
        weights = {name: value + step * (moved_by[name] - value) for name, value in primal.items()}
        return torch.func.functional_call(model, weights, x)

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    y, dy = stn.pushforward(x, delta=delta)
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(dy, expected, rtol=1e-6, atol=1e-7)
    assert expected.abs().sum() > 0


@WEIGHTED
def test_absolute_errors_keep_their_weight_beside_a_network_too():
    assert F.l1_loss.__module__ == "torch.nn.functional"  # what a trace puts in its place is gone
    assert fxstn.verify(Errors("mean"), torch.randn(5, 4)).ok


class Seeded(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.layer, self.seed = nn.Linear(4, 4), seed

    def forward(self, x):
        self.seed(0)
        y = self.layer(x)
        return y + torch.randn_like(y)


SEEDS = {"torch": lambda seed: torch.manual_seed(seed), "torch.random": lambda seed: torch.random.manual_seed(seed)}


@pytest.mark.parametrize("place", list(SEEDS))
def test_a_forward_that_sets_a_seed_draws_the_same_each_time(place):
    model, x = Seeded(SEEDS[place]), torch.randn(3, 4)
    stn = fxstn.transform(model, SCALAR, example_inputs=x)
    assert stn.frontend == "live"
    for _ in range(2):
        torch.testing.assert_close(stn(x), model(x))


@pytest.mark.parametrize("trace", ["fx", "export"])
def test_a_graph_refuses_a_seed(trace):
    with pytest.raises(fxstn.TransformError, match=r'torch.manual_seed, which a traced graph would lose.*trace="live"'):
        fxstn.transform(Seeded(SEEDS["torch"]), SCALAR, example_inputs=torch.randn(3, 4), trace=trace)


class Scores(nn.Module):
    """Products that are added to what torch does not read: memory that nothing was written to, say."""

    def __init__(self, add):
        super().__init__()
        self.layer, self.add = nn.Linear(4, 4), add

    def forward(self, x):
        return self.add(self.layer(x))


PRODUCTS = {
    "baddbmm": lambda q: torch.baddbmm(q.new_full((), torch.nan).expand(5, 5), q, q.mT, beta=0.0, alpha=0.5),
    "addbmm": lambda q: torch.addbmm(q.new_full((), torch.nan).expand(5, 5), q, q.mT, beta=0),
    "addmm": lambda q: torch.addmm(q.new_full((), torch.inf).expand(5, 5), q[0], q[1].mT, beta=0.0),
    "addmv": lambda q: torch.addmv(q.new_full((), torch.nan).expand(5), q[0], q[1, 0], beta=0, alpha=2),
    "addr": lambda q: torch.addr(q.new_full((), torch.nan).expand(4, 4), q[0, 0], q[1, 0], beta=0),
}


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_what_a_sum_leaves_out_may_be_anything(name, trace):
    model, x = Scores(PRODUCTS[name]).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    stn = fxstn.transform(model, SCALAR, example_inputs=x, trace=trace)
    randomize_response(stn)
    y, dy = stn.pushforward(x, delta=torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(stn(x), model(x))
    torch.testing.assert_close(y, model(x))
    assert dy.isfinite().all()
    assert dy.abs().sum() > 0


class Eigenvectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 9), nn.Linear(9, 2)

    def forward(self, x):
        matrices = self.first(x).view(-1, 3, 3)
        return self.last(torch.linalg.eigh(matrices + matrices.mT)[1].square().flatten(1))


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_the_response_learns_through_eigenvectors(trace):
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    stn = fxstn.transform(Eigenvectors(), SCALAR, example_inputs=x, trace=trace)
    randomize_response(stn)
    stn.pushforward(x, delta=torch.ones(1))[1].square().sum().backward()
    gradients = [parameter.grad for parameter in stn.response_parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert fxstn.verify(Eigenvectors(), torch.randn(6, 4), trace=trace).ok
