"""Nothing that the original does in training is lost or frozen without a word: the same numbers, or a refusal."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import fxstn
from fxstn import hp
from tests.nets import randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0.0, 1.0)]


class Body(nn.Module):
    """Two linear layers, a buffer, an identity, and any forward."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.same = nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()
        self.register_buffer("mean", torch.randn(6))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def into(f):
    """f in place on a value that is read again."""
    return lambda s, x: (lambda h: (f(s, h), s.b(h) + h)[1])(s.a(x))


def assign_part(h):
    h[:, 1:3] += h[:, :2].exp()


SAME = {
    "buffer": lambda s, x: (s.a(x) - s.mean.view(1, -1)) * (s.mean.exp() + 1e-5).rsqrt(),
    "constant": lambda s, x: s.a(x) + torch.tensor([1.0]) * torch.arange(6),
    "noise": lambda s, x: s.a(x) + torch.randn(4, 6) + torch.rand_like(x),
    "drop path": lambda s, x: s.a(x) * x.new_empty((4, 1)).bernoulli_(0.5),
    "dropout off": lambda s, x: torch.dropout(s.a(x), p=0.5, train=False),
    "stride without bias": lambda s, x: F.conv2d(s.a(x).view(1, 1, 4, 6), x.view(6, 1, 2, 2)[:1] * 0 + 1, stride=2),
    "functional batch norm": lambda s, x: F.batch_norm(s.a(x), None, None, training=True),
    "conversions": lambda s, x: s.a(x).float().cpu().contiguous(),
    "normalize": lambda s, x: F.normalize(s.a(x)),
    "add with alpha": lambda s, x: torch.add(s.a(x), other=x, alpha=2),
    "power of two": lambda s, x: 2 ** s.a(x) + x**2,
    "where": lambda s, x: s.a(x).where(x > 0, x),
    "largest": lambda s, x: s.a(x).max(dim=1).values,
    "modulo": lambda s, x: s.a(x) % 2.0,
    "cut off": lambda s, x: (lambda h: (h.detach_(), s.b(h) * h)[1])(s.a(x)),
    "two draws": lambda s, x: F.rrelu(s.a(x), training=True) - F.rrelu(s.a(x), training=True),
    "augmented": into(lambda s, h: h.add_(1)),
    "assigned": into(lambda s, h: h.__setitem__((slice(None), 0), h.sum(1))),
    "assigned in part": into(lambda s, h: assign_part(h)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_train_graph_computes_and_differentiates_as_the_original(name):
    net = Body(SAME[name]).train()
    stn = fxstn.transform(net, SCALAR, response="structured").train()
    with torch.no_grad():  # weights and buffers may change after transform
        for tensor, twin in zip((*net.parameters(), net.mean), (*stn.model.parameters(), stn.model.mean), strict=True):
            twin.copy_(tensor.add_(0.1))
    x, outputs = torch.randn(4, 6), []
    for module in (net, stn):
        torch.manual_seed(1)
        outputs.append(module(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    g = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(g)
    gradients = [[p.grad for p in module.parameters()] for module in (net, stn.model)]
    assert any(g is not None for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "name", [name for name in SAME if name not in ("noise", "drop path", "cut off", "two draws", "conversions")]
)
def test_its_tangent_is_the_derivative_of_the_original(name):  # but random ones, and .float(), which rounds
    report = fxstn.verify(Body(SAME[name]), torch.randn(4, 6), hparams=SCALAR)
    assert report.ok, str(report)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.calls = nn.Linear(6, 6), 0

    def forward(self, x):
        self.calls += 1
        self.last = self.a(x)
        return self.last


# With the line of the forward. A pattern in that very line would match itself.
SHARED = r"memory 'linear' shares and reads later in the model itself, .*test_fidelity\.py:\d+"
REFUSED = {
    "identity": (into(lambda s, h: F.relu(s.same(h), inplace=True)), SHARED),
    "ravel": (into(lambda s, h: h.ravel().relu_()), SHARED),
    "transpose": (
        lambda s, x: (lambda h: (h.view(-1).relu_(), h.T.t())[1])(s.a(x)),
        SHARED,
    ),
    "buffer update": (lambda s, x: s.a(x) * s.mean.mul_(0.9), "changes 'mean', of the model itself"),
    "all parameters": (
        lambda s, x: s.a(x) + sum(p.pow(2).sum() for p in s.parameters()),
        "pow of a parameter or buffer",
    ),
    "python's random": (lambda s, x: s.a(x) * random.random(), "a random draw in Python"),
    "normal_": (lambda s, x: s.a(x) + torch.full_like(x, 50.0).normal_(), r"Tensor\.normal_ changes a tensor in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused(name):
    body, message = REFUSED[name]
    with pytest.raises(fxstn.TransformError, match=message):
        fxstn.transform(Body(body), SCALAR)


def test_a_forward_that_assigns_attributes_is_refused_and_left_alone():
    net = Counting()
    with pytest.raises(fxstn.TransformError, match="the forward assigns 'calls', 'last'"):
        fxstn.transform(net, SCALAR)
    assert not fxstn.explain(net, SCALAR).ok
    assert net.calls == 0
    assert not hasattr(net, "last")


@pytest.mark.parametrize("trace", ["fx", "export"])
def test_a_forward_that_appends_to_a_list_in_a_list_is_refused_and_left_alone(trace):
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.memory = nn.Linear(6, 6), {"steps": [[], ()]}

        def forward(self, x):
            y = self.fc(x)
            self.memory["steps"][0].append(y)
            return y

    net, x = Remembering(), torch.randn(4, 6)
    with pytest.raises(fxstn.TransformError, match="the forward assigns 'memory'"):
        fxstn.transform(net, SCALAR, example_inputs=x, trace=trace)
    assert net.memory == {"steps": [[], ()]}


def test_statistics_loaded_after_transform_are_read_by_every_graph():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Tanh())
    stn, x = fxstn.transform(net, SCALAR).train(), torch.randn(2, 3, 8, 8)
    stn.model[1].running_var.fill_(9.0)
    expected = stn.model(x)
    torch.testing.assert_close(stn(x), expected)
    torch.testing.assert_close(stn.pushforward(x, delta=torch.zeros(1))[0], expected)


def test_inputs_with_a_constant_default_keep_it_unless_examples_supply_them():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, mask=None, scale=2.0):
            h = self.fc(x) * scale
            return h if mask is None else h * mask

    net, x, mask = Masked(), torch.randn(4, 6), torch.rand(4, 6)
    torch.testing.assert_close(fxstn.transform(net, SCALAR)(x), net(x))
    with pytest.raises(
        TypeError, match=r"traced with the inputs \(x\) and got mask, too; give transform example_inputs"
    ):
        fxstn.transform(net, SCALAR)(x, mask)
    stn = fxstn.transform(net, SCALAR, example_inputs=(x, mask))
    torch.testing.assert_close(stn(x, mask), net(x, mask))
    assert fxstn.verify(net, x, mask, hparams=SCALAR).ok
    assert fxstn.explain(net, SCALAR, (x, mask)).ok


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_every_method_updates_running_statistics_once_per_general_step(method):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    stn = fxstn.transform(net, method=method).train()
    x, target = torch.randn(4, 6) + 3, torch.zeros(4, 2)
    fxstn.general_loss(stn, F.mse_loss, x, target)
    assert stn.model[1].num_batches_tracked == 1
    assert stn.model[1].running_mean.any()
    fxstn.response_loss(stn, F.mse_loss, x, target)
    assert stn.model[1].num_batches_tracked == 1


SWAPS = {
    "negative": lambda h: h.transpose(-3, -2),
    "keywords": lambda h: h.transpose(dim0=0, dim1=1),
    "swapaxes": lambda h: h.swapaxes(-3, -2),
    "flip": lambda h: h.flip([-3]),
    "roll": lambda h: h.roll(1, -3),
    "mT": lambda h: h.transpose(0, 2).mT.transpose(0, 1),
    "cumsum": lambda h: h.cumsum(0),
    "mix": lambda h: torch.ones(4, 4, dtype=h.dtype) @ h.flatten(1),
}
MIXING = {"flip", "roll", "cumsum", "mix"}


class Moving(nn.Module):
    def __init__(self, swap):
        super().__init__()
        self.a, self.b, self.swap = nn.Linear(4, 4), nn.Linear(4, 4), swap

    def forward(self, x):
        return self.b(self.swap(self.a(x)).reshape(4, 4, 4))


def with_moving_examples(name: str) -> tuple[fxstn.SelfTuningNetwork, torch.Tensor, torch.Tensor]:
    """(network, inputs, a delta per example)."""
    stn = fxstn.transform(Moving(SWAPS[name]).double(), SCALAR).eval()
    randomize_response(stn)
    return stn, torch.randn(4, 4, 4).double(), torch.randn(4, 1).double()


@pytest.mark.parametrize("name", sorted(MIXING))
def test_where_examples_mix_a_per_example_delta_is_refused(name):
    stn, x, delta = with_moving_examples(name)
    with pytest.raises(ValueError, match="not along one dimension"):
        stn.pushforward(x, delta=delta)


@pytest.mark.parametrize("name", [name for name in SWAPS if name not in MIXING])
def test_where_examples_move_to_another_axis_a_per_example_delta_moves_with_them(name):
    stn, x, delta = with_moving_examples(name)
    _, rows = stn.pushforward(x, delta=delta)
    axis = 0 if name == "mT" else 1
    for i in range(4):
        shared = stn.pushforward(x, delta=delta[i])[1]
        torch.testing.assert_close(rows.select(axis, i), shared.select(axis, i), rtol=1e-9, atol=1e-12)


def test_every_weight_of_a_module_is_penalised():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.ws = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])

        def forward(self, x):
            return F.linear(F.linear(x, self.ws[0]), self.ws[1])

    stn = fxstn.transform(Two(), [hp.WeightDecay(init=0.01)])
    assert stn.hparams.names == ("ws.weight_decay",)
    expected = sum(0.5 * 0.01 * w.square().sum() for w in stn.model.ws)
    assert stn.penalty().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_link_under_a_view_is_linearised_before_it():
    class Probability(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 1)

        def forward(self, x):
            return torch.sigmoid(self.fc(x)).squeeze(-1)

    stn = fxstn.transform(Probability(), SCALAR)
    randomize_response(stn, 50.0)
    output, _ = stn.perturbed_output(torch.randn(20, 6), delta=torch.randn(20, 1))
    assert ((output >= 0) & (output <= 1)).all()


def test_channelwise_dropout_of_an_unbatched_value_drops_rows():
    net = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Dropout1d(0.5))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(50))
    y = fxstn.transform(net).train()(torch.ones(40, 50))
    assert all(row.unique().numel() == 1 for row in y)
    assert 5 < (y[:, 0] == 0).sum() < 35
