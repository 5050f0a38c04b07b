"""Forwards that do more than compute an output: they keep values, take derivatives, update buffers, pack sequences."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.ir.containers import attributes
from tests.nets import randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0.0, 1.0), hp.Scalar("b", 0.5, 0.0, 1.0)]


class Keeping(nn.Module):
    """Two layers; `keep` does something with the hidden value."""

    def __init__(self, keep):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.memory, self.aside, self.keep = {"steps": []}, SimpleNamespace(h=None), keep

    def forward(self, x):
        h = torch.tanh(self.a(x))
        self.keep(self, h)
        return self.b(h)


def store(memory, module, inputs, output):
    memory["steps"].append(output)


class Hooked(Keeping):
    def __init__(self):
        super().__init__(lambda net, h: None)
        self.a.register_forward_hook(functools.partial(store, self.memory))


KEEPERS = {
    "an attribute": lambda: Keeping(lambda net, h: setattr(net, "h", h)),
    "an attribute of a child": lambda: Keeping(lambda net, h: setattr(net.b, "h", h)),
    "a list in a dict": lambda: Keeping(lambda net, h: net.memory["steps"].append(h)),
    "a dict": lambda: Keeping(lambda net, h: net.memory.update(h=h)),
    "another object": lambda: Keeping(lambda net, h: setattr(net.aside, "h", h)),
    "a hook": Hooked,
}


def values_kept(model: nn.Module) -> list[Tensor]:
    return [x for _, x in attributes(model) if not isinstance(x, nn.Parameter)]


@pytest.mark.parametrize("keeper", KEEPERS)
def test_copies_of_a_network_have_what_its_forward_keeps_without_graphs(keeper):
    net, x, y = KEEPERS[keeper](), torch.randn(5, 4), torch.zeros(5, 3)
    net(x)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, trace="live")
    assert values_kept(net)[-1].grad_fn is not None  # the model itself is as it was
    stn.train()(x)
    after_general_step = list(map(id, values_kept(stn.model)))
    fxstn.response_loss(stn, F.mse_loss, x, y).backward()
    fxstn.hyper_loss(stn, F.mse_loss, x, y).backward()
    assert list(map(id, values_kept(stn.model))) == after_general_step
    for other in (copy.deepcopy(stn).model, stn.export()):
        assert len(values_kept(other)) == len(after_general_step)
        assert not any(value.requires_grad for value in values_kept(other))


def test_tracing_notices_what_a_forward_keeps_in_another_object():
    with pytest.raises(fxstn.TransformError, match="the forward assigns 'aside'"):
        fxstn.transform(KEEPERS["another object"](), SCALAR, trace="fx")


class Averaging(nn.Module):
    """Two layers, and a buffer that follows the mean of the hidden value, in some spelling."""

    def __init__(self, update):
        super().__init__()
        self.a, self.b, self.update = nn.Linear(4, 4), nn.Linear(4, 3), update
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.update(self, h.detach().mean(0))
        return self.b(torch.tanh(h - self.mean))


def without_gradients(net, mean):
    with torch.no_grad():
        net.mean.mul_(0.9).add_(mean, alpha=0.1)


UPDATES = {
    "without gradients": without_gradients,
    "on .data in place": lambda net, mean: net.mean.data.mul_(0.9).add_(mean, alpha=0.1),
    "an assignment of .data": lambda net, mean: setattr(net.mean, "data", 0.9 * net.mean.data + 0.1 * mean),
    "an assignment": lambda net, mean: setattr(net, "mean", 0.9 * net.mean + 0.1 * mean),
}


@pytest.mark.parametrize("update", UPDATES)
def test_a_buffer_is_updated_in_general_steps_alone_by(update):
    net, x, y = Averaging(UPDATES[update]), torch.randn(5, 4), torch.zeros(5, 3)
    for trace in ("fx", "export") if update == "an assignment of .data" else ("fx",):
        with pytest.raises(fxstn.TransformError, match=r"no_grad region|changes 'mean'|assigns \.data|assigns 'mean'"):
            fxstn.transform(net, SCALAR, example_inputs=x, trace=trace)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, trace="live").train()
    assert not stn.model.mean.any()
    net.train()(x)
    stn(x)
    fxstn.response_loss(stn, F.mse_loss, x, y).backward()
    fxstn.hyper_loss(stn, F.mse_loss, x, y).backward()
    assert net.mean.any()
    torch.testing.assert_close(stn.model.mean, net.mean)


class Deformable(nn.Module):
    """A convolution whose offsets, and with them the places that it reads, come from another one."""

    def __init__(self):
        super().__init__()
        self.offsets, self.strengths = nn.Conv2d(3, 8, 2), nn.Conv2d(3, 4, 2)
        self.convolution = torchvision.ops.DeformConv2d(3, 4, 2)

    def forward(self, x):
        return self.convolution(x, self.offsets(x), torch.sigmoid(self.strengths(x)))


def graph_network(net, x, graph):
    return net.b(torch.sparse.mm(graph, torch.tanh(net.a(x))))


def attention_on_a_graph(net, x, graph):
    h, (to, source) = net.a(x), graph.coalesce().indices()
    weights = torch.sparse_coo_tensor(
        graph.coalesce().indices(), (h[to] * h[source]).sum(1), (4, 4), check_invariants=True
    )
    return net.b(torch.sparse.mm(weights, h))


class Called(nn.Module):
    """Two layers with any function of their outputs."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.body = nn.Linear(4, 4), nn.Linear(4, 3), body

    def forward(self, *inputs):
        return self.body(self, *inputs)


GRAPH = torch.tensor([[0, 1.5, 0, 0], [0.5, 0, 2, 1], [0, 0, 1, 0], [3, 0, 0, 1]]).to_sparse()
OTHERS = {
    "learned offsets": (Deformable, (torch.randn(2, 3, 5, 5),)),
    "a sparse graph": (lambda: Called(graph_network), (torch.randn(4, 4), GRAPH)),
    "a graph by operators": (lambda: Called(lambda net, x, graph: net.b(graph @ net.a(x))), (torch.randn(4, 4), GRAPH)),
    "a graph with learned weights": (lambda: Called(attention_on_a_graph), (torch.randn(4, 4), GRAPH)),
    "segments": (
        lambda: Called(lambda net, x, n: net.b(torch.segment_reduce(net.a(x).tanh(), "max", lengths=n, axis=0))),
        (torch.randn(4, 4), torch.tensor([1, 3])),
    ),
    "alignments": (
        lambda: Called(
            lambda net, x, y: F.ctc_loss(net.b(net.a(x)).log_softmax(-1), y, (4, 3), (2, 1), zero_infinity=True)
        ),
        (torch.randn(4, 2, 4), torch.tensor([[1, 2], [2, 1]])),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_law_one_holds_for(name):
    make, inputs = OTHERS[name]
    report = fxstn.verify(make(), *inputs, hparams=SCALAR)
    assert report.ok, str(report)


def energy(net, x):
    return net.b(torch.tanh(net.a(x))).square().sum()


def physics_informed(net, x):
    x = x.requires_grad_()
    u = net.b(torch.tanh(net.a(x)))
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.cat([u, slope], 1)


def adapted(net, x):
    """One inner step on a weight, as model-agnostic meta-learning does."""
    weight = net.b.weight
    (slope,) = torch.autograd.grad(F.linear(x, weight).square().mean(), weight, create_graph=True)
    return F.linear(torch.tanh(net.a(x)), weight - 0.1 * slope)


DERIVATIVES = {
    "torch.autograd.grad": physics_informed,
    "torch.autograd.grad in a weight": adapted,
    "torch.func.grad": lambda net, x: torch.func.grad(lambda v: energy(net, v))(x),
    "torch.vmap of torch.func.grad": lambda net, x: torch.vmap(torch.func.grad(lambda v: energy(net, v)))(x),
    "torch.func.hessian": lambda net, x: torch.vmap(torch.func.hessian(lambda v: energy(net, v)))(x).sum(1).softmax(-1),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_forward_may_take_derivatives_by(name):
    net, x = Called(DERIVATIVES[name]).double(), torch.randn(3, 4, dtype=torch.float64)
    report = fxstn.verify(net, x, hparams=SCALAR, trace="live")
    assert report.ok, str(report)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, trace="live")
    with torch.no_grad():
        expected = net(x) if "func" in name else torch.enable_grad()(net)(x)
        assert torch.equal(stn.eval()(x), expected)  # evaluation records no gradients
    randomize_response(stn)
    parameters, delta = list(stn.response_parameters()), torch.randn(2, dtype=torch.float64)

    def loss(step=0.0, directions=()):
        for parameter, direction in zip(parameters, directions, strict=False):
            parameter.data.add_(step * direction)
        output, _ = stn.perturbed_output(x.clone(), delta=delta, training=True)
        for parameter, direction in zip(parameters, directions, strict=False):
            parameter.data.sub_(step * direction)
        return output.square().sum()

    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    expected = (loss(1e-6, directions) - loss(-1e-6, directions)) / 2e-6
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in stn.general_parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    net = Called(
        lambda net, x: torch.nested.as_nested_tensor([net.a(x), net.a(x[:2])], layout=layout).to_padded_tensor(0)
    )
    with pytest.raises(fxstn.TransformError, match=r"a nested tensor, .* pad the batch"):
        fxstn.transform(net, SCALAR, example_inputs=torch.randn(3, 4), trace="live")


def _ensemble(net, h):
    weights = torch.stack([layer.weight for layer in net.layers])
    return torch.func.vmap(lambda weight: F.linear(h, weight))(weights).tanh().sum(0)


INDEXED = {
    "an index expanded as a value": lambda net, h: (
        h[:, None].expand(-1, 2, -1).gather(1, net.index(h).expand_as(h[:, None]))
    ),
    "an index viewed as a value": lambda net, h: h.gather(1, (h.detach() > 0).long().flatten().view_as(h)),
    "a reduction at an index": lambda net, h: h.new_zeros(h.shape).scatter_reduce(
        1, (h > 0).long().view_as(h), h, "mean"
    ),
    "blocks": lambda net, h: h @ torch.block_diag(*net.blocks.unbind()),
    "a cartesian product": lambda net, h: h @ torch.cartesian_prod(net.blocks[0, 0], net.blocks[1, 0]),
    "an ensemble": _ensemble,
    "folds": lambda net, h: F.fold(h[:, :, None].expand(-1, -1, 4), (2, 2), 1).flatten(1)[:, :4],
}


class Indexed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.enter, self.out, self.body = nn.Linear(3, 4), nn.LazyLinear(2), body
        self.blocks = nn.Parameter(torch.randn(2, 2, 2))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def index(self, h):
        return (h.detach() > 0).long()[:, None]

    def forward(self, x):
        return self.out(self.body(self, torch.tanh(self.enter(x))))


@pytest.mark.parametrize("name", INDEXED)
def test_the_first_frontend_that_can_follows_it_rightly(name):
    torch.manual_seed(0)
    net, x = Indexed(INDEXED[name]).double(), torch.randn(5, 3).double()
    net(x)
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1)], example_inputs=x)
    nn.init.normal_(stn.response.flat_U)
    deltas = torch.randn(5, 1).double()
    rows = stn.pushforward(x, delta=deltas)[1] if stn.per_example(x) else None
    for i, delta in enumerate(deltas):
        moved = [functional_call(net, stn.best_response(step * delta), (x,)) for step in (1e-6, -1e-6)]
        difference = (moved[0] - moved[1]) / 2e-6
        torch.testing.assert_close(stn.pushforward(x, delta=delta)[1], difference, rtol=1e-6, atol=1e-8)
        if rows is not None:
            torch.testing.assert_close(rows[i], difference[i], rtol=1e-6, atol=1e-8)
    assert stn.coverage.responding == stn.coverage.possible
