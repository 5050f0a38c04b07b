"""Tensors that a forward makes by torch's old constructors: x.new(...), torch.FloatTensor(...), torch.BoolTensor(...)."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.spelling import respell

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class Net(nn.Module):
    """Two linear layers with a function of what the first puts out between them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)
        self.function = function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def half_filled(x):
    result = x.new(x.size())
    result[:, :1].copy_(x[:, 1:])
    result[:, 1:].fill_(3.0)
    return result


def other_is_an_alias(x):
    doubled = x * 2
    alias = doubled.new(doubled)
    alias.mul_(3.0)
    return doubled + alias


def masked_row(x):
    mask = torch.BoolTensor(x.size()).fill_(False)
    mask[1].fill_(True)
    return x.masked_fill(mask, 0.5)


def masked_array(x):
    mask = torch.from_numpy(numpy.zeros(tuple(x.shape), dtype=bool))
    mask[1].fill_(True)
    return x.masked_fill(mask, 0.5)


def counted(x):
    places = torch.LongTensor(x.size(0)).zero_()
    places[1] = 1
    return x[places] * torch.ByteTensor(x.size()).fill_(3)


SIZES = {
    "a size": lambda x: x * x.new(x.size()).fill_(2.0).sum(0),
    "a size of its own": lambda x: x * x.new(torch.Size([2])).fill_(2.0).sum(),
    "sizes": lambda x: x * x.new(x.size(0), 2).fill_(2.0).sum(0),
    "one size": lambda x: x * x.new(2).fill_(2.0),
    "a size by name": lambda x: x * x.new(size=tuple(x.shape), device="cpu").fill_(2.0),
    "nothing": lambda x: torch.cat([x.flatten(), x.new()]).view_as(x),
    "data": lambda x: x * x.new([2.0, 3.0]),
    "another tensor": lambda x: x * x.detach().new(x),
    "another tensor, then changed": other_is_an_alias,
    "noise": lambda x: x + x.new(x.size()).normal_(0, 1.0),
    "a part of each": half_filled,
}
FILLED = {
    "filled, a mask": masked_row,
    "filled, an array": masked_array,
    "filled, integers": counted,
    "filled, zeros": lambda x: x + torch.DoubleTensor(x.size()).zero_().to(x) + 1,
    "filled, ones": lambda x: x * torch.Tensor(*x.size()).fill_(2.0),
    "filled, uniform noise": lambda x: x * torch.FloatTensor(x.size()).uniform_(),
    "filled, bits": lambda x: x * torch.FloatTensor(x.size()).bernoulli_(0.5),
    "filled, a value that varies": lambda x: x * torch.Tensor(x.size()).copy_(x),
}


@pytest.mark.parametrize("function", [*SIZES.values(), *FILLED.values()], ids=[*SIZES, *FILLED])
def test_a_tensor_of_an_old_constructor_is_what_it_is_in_the_original(function):
    model, x = Net(function).double().eval(), torch.rand(4, 3, dtype=torch.float64)
    network = fxstn.transform(model, SCALAR, example_inputs=x, trace="live").eval()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    value, _ = network.pushforward(x, delta=torch.zeros(1))
    torch.testing.assert_close(value, expected)
    report = fxstn.verify(model, x, hparams=SCALAR, trace="live")
    assert report.ok, str(report)


def test_a_size_stays_one_where_torch_differentiates_in_a_graph():
    report = fxstn.verify(Net(half_filled), torch.rand(4, 3), hparams=SCALAR, trace="fx")
    assert report.ok, str(report)


@pytest.mark.parametrize("sizes", [(torch.Size([3, 2]),), (3, 2), (3,), (), (torch.Size([]),)])
def test_new_has_the_spelling_of_new_empty_where_it_takes_sizes(sizes):
    x = torch.zeros(2)
    spelled = respell("new", (x, *sizes), {})
    assert spelled.function is torch.Tensor.new_empty
    assert spelled.function(*spelled.args).shape == x.new(*sizes).shape


@pytest.mark.parametrize("value", [[3.0, 2.0], (3, 2), torch.ones(3)], ids=["list", "tuple", "tensor"])
def test_new_keeps_its_spelling_where_it_takes_data(value):
    assert respell("new", (torch.zeros(2), value), {}).function is torch.Tensor.new


def test_memory_that_numpy_may_see_is_refused_also_where_it_is_filled():
    body = lambda x: x + torch.from_numpy(x.detach().numpy()).zero_()  # noqa: E731
    with pytest.raises(fxstn.TransformError, match="no torch operation"):
        fxstn.transform(Net(body), SCALAR, example_inputs=torch.rand(4, 3), trace="live")
