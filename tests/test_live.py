"""The live rung: forwards that no graph can hold, with tangents carried beside them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from nets import randomize_response
from torch import nn

import fxstn
from fxstn import hp
from fxstn.live.structure import leaves

SCALAR = [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)]


def checked(model, *inputs, hparams=None, **options):
    report = fxstn.verify(model, *inputs, hparams=hparams or SCALAR, trace="live", **options)
    assert {check.mode for check in report.checks} == {"train", "eval"}
    assert report.ok, str(report)


class Net(nn.Module):
    """Two linear layers with any function of their outputs, of the module itself and of the input around them."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def body(function):
    BODIES.append(function)
    return function


BODIES = []


@body
def loop_until_small(net, x):
    h = net.a(x)
    while h.norm() > 0.5:
        h = 0.6 * torch.tanh(h)
    return net.b(h)


@body
def branch_on_data(net, x):
    rows = [net.a(row) if row.sum() > 0 else torch.sin(net.b(row)) for row in x]
    return torch.stack(rows)


@body
def in_place_on_views(net, x):
    h = net.a(x)
    left, right = h[:, :3], h[:, 3:]
    left.mul_(2).tanh_()
    h[h > 0.3] = 0.0
    right[:, 1:] += left[:, :2] * net.b(x)[:, :2]
    h.t()[0] = h[:, 1] ** 2
    return h * right.sum() + left.exp().sum()


@body
def in_place_relu_keeps_what_rules_saved(net, x):
    h = net.a(x)
    y = h.sigmoid()
    z = y * h
    y.mul_(3.0).relu_()
    h.zero_().add_(1.0)
    return z + y * h


@body
def preallocated(net, x):
    out = x.new_zeros(len(x), 6)
    view = out[:, ::2]
    for i, row in enumerate(x):
        out[i] = net.a(row)
        view[i] *= net.b(row)[:3]
    out.masked_fill_(out < -0.5, -0.5)
    return out.clone().copy_(out[0]) + out


@body
def computed_into(net, x):
    mask = torch.zeros(6, dtype=torch.bool)
    mask[::2] = True
    mask.logical_not_()
    out = x.new_empty(0)
    torch.where(mask, x, -x, out=out)
    return net.a(out)


@body
def constants_and_no_grad(net, x):
    h = net.a(x)
    with torch.no_grad():
        weight = net.b(h).abs()
        net.count.add_(1).mul_(h.mean())
    return torch.cat([h * weight, h.detach() * net.b(x), h * net.count])


@body
def autocast_off_and_stateful(net, x):
    with torch.autocast("cpu", enabled=False):
        net.last = net.a(x)
    return net.b(net.last.relu()) + net.last


@body
def nested_output(net, x):
    h = net.a(x)
    return {"h": h, "parts": [h.sum(), (h.argmax(1), "name", None)], "constant": torch.ones(3), "x": x}


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    label: torch.Tensor


@body
def dataclass_output(net, x):
    h = net.b(F.normalize(net.a(x)))
    return Result(F.log_softmax(h, 1), h.argmax(1))


@body
def composite_functions(net, x):
    h = net.a(x)
    loss = F.cross_entropy(net.b(h), torch.arange(len(x)) % 6, label_smoothing=0.1)
    grid = F.interpolate(h[None, None], scale_factor=2, mode="bilinear")
    return loss + F.gaussian_nll_loss(h, x, h.exp()) + F.cosine_similarity(h, x) + grid.mean() + h.norm(dim=1)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x**3, y

    @staticmethod
    def backward(ctx, dy, dz):
        return 3 * ctx.saved_tensors[0] ** 2 * dy, dz


@body
def custom_autograd_function(net, x):
    cubed, same = Cube.apply(net.a(x), net.b(x))
    return cubed.sum(1) + same.sum(1)


@pytest.mark.parametrize("function", BODIES, ids=lambda function: function.__name__)
def test_the_tangent_is_the_derivative_of_the_original_forward(function):
    checked(Net(function), torch.randn(4, 6))


def live(model, *inputs, hparams=None, method="delta"):
    stn = fxstn.transform(model, hparams or SCALAR, example_inputs=inputs, trace="live", method=method)
    randomize_response(stn)
    return stn


def flat(structure):
    return torch.cat([leaf.flatten() for leaf in leaves(structure) if isinstance(leaf, torch.Tensor)])


@pytest.mark.parametrize("function", BODIES, ids=lambda function: function.__name__)
def test_the_gradient_of_a_live_tangent_reaches_the_response_parameters(function):
    """dy is linear in U: its gradient times a change of U is the change of dy, whatever the forward wrote in place."""
    torch.manual_seed(0)
    x, delta = torch.randn(4, 6).double(), torch.randn(2).double()
    stn = live(Net(function).double(), x)
    before = flat(stn.pushforward(x, delta=delta)[1])
    weights = torch.randn_like(before)
    scales = [parameter for name, parameter in stn.response.named_parameters() if name.endswith("U")]
    gradients = torch.autograd.grad(before @ weights, scales, allow_unused=True)
    changes = [torch.randn_like(scale) for scale in scales]
    expected = sum((g * c).sum() for g, c in zip(gradients, changes, strict=True) if g is not None)
    with torch.no_grad():
        for scale, change in zip(scales, changes, strict=True):
            scale.add_(change)
        after = flat(stn.pushforward(x, delta=delta)[1])
    torch.testing.assert_close((after - before) @ weights, expected, rtol=1e-9, atol=1e-9)
