"""transform runs no more than it must: one graph on values, the others without, and no copy of the parameters."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxstn
from fxstn import hp
from fxstn.frontends import preservation

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class CountedProducts(TorchDispatchMode):
    """Counts the products of matrices that are computed on values."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        product = function._schema.name in ("aten::addmm", "aten::mm")
        self.number += product and not result.is_meta
        return result


class Products(nn.Module):
    """Two layers, and what stands between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 2), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Halved(nn.Module):
    """A layer of its own type."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, h):
        return self.fc(h.bfloat16()).float()


def _products(model):
    counted = CountedProducts()
    with counted:
        fxstn.transform(model, SCALAR, example_inputs=torch.randn(4, 6), trace="fx")
    return counted.number


def test_only_the_training_graph_runs_on_values():
    assert _products(Products(torch.tanh)) == 2


@pytest.mark.parametrize(
    "between", [lambda h: h * h.gt(0).nonzero().size(1), Halved()], ids=["sizes from values", "two types"]
)
def test_every_graph_runs_on_values_where_sizes_say_too_little(between):
    assert _products(Products(between)) > 8


def test_weights_of_several_names_come_back_from_the_runs_without_values():
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    model.tied = nn.Linear(6, 6)
    model.tied.weight = layer.weight
    stn = fxstn.transform(model, SCALAR, example_inputs=x)
    assert not any(parameter.is_meta for parameter in stn.parameters())
    assert stn.model[0] is stn.model[2]
    assert stn.model.tied.weight is stn.model[0].weight
    assert torch.equal(stn.eval()(x), model.eval()(x))


@torch.fx.wrap
def written(x, weight):
    weight.detach().numpy().__iadd__(1)
    return x


class WritesItsWeight(Products):
    """A function that nobody looks into writes into a weight."""

    def forward(self, x):
        return self.b(written(self.a(x), self.b.weight))


@pytest.mark.parametrize(("model", "copies"), [(Products(torch.tanh), 0), (WritesItsWeight(torch.tanh), 1)])
def test_parameters_are_copied_only_where_a_graph_may_write_into_them(model, copies, monkeypatch):
    saved = []

    class Saved(preservation.SavedTensor):
        def __init__(self, tensor):
            saved.append(tensor)
            super().__init__(tensor)

    monkeypatch.setattr(preservation, "SavedTensor", Saved)
    stn = fxstn.transform(model, SCALAR, example_inputs=torch.randn(4, 6))
    weights = [tensor for tensor in saved if tensor is stn.model.b.weight]
    assert min(len(weights), 1) == copies
    assert torch.equal(stn.model.b.weight, model.b.weight)


def test_the_collector_of_garbage_goes_on_after_transform():
    assert gc.isenabled()
    fxstn.transform(Products(torch.tanh), SCALAR)
    assert gc.isenabled()
