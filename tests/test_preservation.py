"""transform, verify and explain leave the model, its copy in the network, and the inputs as they were, bit for bit."""

from __future__ import annotations

import copy
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations

import fxstn
from fxstn import hp
from fxstn.frontends.preservation import Preservation
from fxstn.ir.containers import attributes, reachable
from tests.nets import mlp

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class Writer(nn.Module):
    """A layer between whatever `write` does to its buffers, its attributes or the input."""

    def __init__(self, write):
        super().__init__()
        self.fc, self.write, self.memory = nn.Linear(6, 6), write, {"seen": [torch.ones(6)]}
        self.register_buffer("buffer", torch.ones(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("wide", torch.ones(1).expand(6))

    def forward(self, x):
        return self.fc(x) * self.write(self, x)


WRITES = {
    "out": lambda m, x: torch.mul(m.buffer, 2, out=m.buffer),
    "out of a layer's values": lambda m, x: F.normalize(m.fc.weight[0].detach(), dim=0, out=m.buffer),
    "foreach": lambda m, x: (torch._foreach_add_([m.buffer, m.memory["seen"][0]], 1), m.buffer)[1],
    "data": lambda m, x: (m.buffer.data.add_(1), m.buffer)[1],
    "numpy": lambda m, x: (m.count.numpy().__iadd__(1), 1)[1],
    "set_": lambda m, x: m.buffer.set_(m.buffer * 3),
    "resize_": lambda m, x: m.buffer.resize_(12)[:6],
    "view": lambda m, x: (m.buffer[::2].mul_(3), m.buffer)[1],
    "expanded view": lambda m, x: (m.wide[0].mul_(3), m.wide)[1],
    "count": lambda m, x: (m.count.add_(1), m.buffer * m.count)[1],
    "assigned buffer": lambda m, x: setattr(m, "buffer", m.buffer + 1) or m.buffer,
    "attribute": lambda m, x: m.memory["seen"][0].add_(x.detach().mean(0)),
    "appended": lambda m, x: (m.memory["seen"].append(m.buffer + 1), m.memory["seen"][-1])[1],
    "input": lambda m, x: x.mul_(2),
    "row of the input": lambda m, x: (x[0].mul_(2), x)[1],
    "input with a gradient": lambda m, x: x.mul_(m.fc.bias),
    "input that requires gradients": lambda m, x: x.requires_grad_(),
    "resized input": lambda m, x: x.unsqueeze_(0)[0],
}


def state(model, inputs):
    tensors = [*attributes(model), *reachable(inputs, "inputs")]
    values = {
        name: (id(x), x.detach().clone(), x.requires_grad, x.grad_fn, x.stride(), x.data_ptr()) for name, x in tensors
    }
    return values, {name: dict(vars(module)) for name, module in model.named_modules()}


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (identity, value, *facts) in before[0].items():
        assert torch.equal(after[0][name][1], value), name
        assert (after[0][name][0], *after[0][name][2:]) == (identity, *facts), name
    assert before[1] == after[1]


CALLS = {
    "transform": lambda model, x: fxstn.transform(model, SCALAR, example_inputs=x, trace="live"),
    "auto": lambda model, x: fxstn.transform(model, SCALAR, example_inputs=x),
    "explain": lambda model, x: fxstn.explain(model, SCALAR, x),
    "verify": lambda model, x: fxstn.verify(model, x, hparams=SCALAR, trace="live"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("write", WRITES)
def test_whatever_a_forward_writes_into_is_left_as_it_was(write, call):
    model, x = Writer(WRITES[write]), torch.randn(4, 6)
    if call == "verify":
        model, x = model.double(), x.double()
    before, plain = state(model, x), [tensor.clone() for _, tensor in attributes(model)]
    result = CALLS[call](model, x)
    assert_same(before, state(model, x))
    if call == "verify":
        assert result.ok, str(result)
    elif call != "explain":
        copies = [tensor for _, tensor in attributes(result.model)]
        assert all(torch.equal(one, other) for one, other in zip(plain, copies, strict=True))


USES = {
    "perturbed output": lambda stn, x: stn.perturbed_output(x, delta=torch.zeros(1)),
    "pushforward": lambda stn, x: stn.pushforward(x, delta=torch.zeros(1)),
    "explain": lambda stn, x: fxstn.explain(stn, example_inputs=x),
}


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
@pytest.mark.parametrize("write", WRITES)
def test_the_response_and_hyper_steps_write_into_nothing(write, method):
    x = torch.randn(4, 6)
    stn = fxstn.transform(Writer(WRITES[write]), SCALAR, example_inputs=x, trace="live", method=method)
    before = state(stn.model, x)
    for training in (True, False):
        for use in USES.values():
            use(stn.train(training), x)
            before[1].update({name: dict(facts, training=training) for name, facts in before[1].items()})
            assert_same(before, state(stn.model, x))


def test_a_converged_spectral_norm_stays_converged():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    for _ in range(300):
        net(x)
    expected = copy.deepcopy(net).eval()(x)
    stn = fxstn.transform(net, [hp.Dropout("0")], example_inputs=x, trace="live")
    assert torch.equal(stn.eval()(x), expected)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_inputs_that_cannot_be_written_to_are_taken(trace):
    with torch.inference_mode():
        of_inference = torch.randn(4, 6)
    for x in (torch.randn(1, 6).expand(4, -1), of_inference, torch.randn(4, 6).mT.contiguous().mT):
        before = x.clone()
        fxstn.transform(mlp(0.3), example_inputs=x, trace=trace)
        assert torch.equal(x, before)


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_buffer_has_its_values_back(sparse):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse layouts beta
        model = nn.Module()
        model.register_buffer("adjacency", sparse(torch.eye(4)))
        with Preservation(model, ()):
            model.adjacency.mul_(3)
        assert torch.equal(model.adjacency.to_dense(), torch.eye(4))


def test_read_only_memory_that_nothing_writes_into_is_taken(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.random.default_rng(0).standard_normal((4, 6), dtype=numpy.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that writing into it would crash
        x = torch.from_numpy(numpy.load(tmp_path / "x.npy", mmap_mode="r"))
    assert fxstn.transform(mlp(0.3), example_inputs=x, trace="live").frontend == "live"


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])


def quantized():
    return torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.quint8)


def fake():
    with FakeTensorMode():
        return torch.randn(4, 6)


@pytest.mark.filterwarnings("ignore")  # torch's own, of prototypes and deprecations
@pytest.mark.parametrize("trace", ["auto", "fx", "export", "live"])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (lambda: torch.randn(4, 6, device="meta"), "the model cannot take inputs .* on device cpu .* device meta"),
        (nested, "example_inputs holds a nested tensor"),
        (quantized, "example_inputs holds a quantized tensor"),
        (fake, "example_inputs holds a fake tensor"),
    ],
    ids=["meta", "nested", "quantized", "fake"],
)
def test_examples_without_sizes_or_values_of_their_own_are_refused(example, message, trace):
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        fxstn.transform(net, example_inputs=example(), trace=trace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize("make", [lambda: torch.ones(3, device="meta"), quantized, lambda: torch.eye(3).to_sparse()])
def test_a_buffer_of_any_kind_is_no_obstacle(make, trace):
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 3))
    net.register_buffer("special", make())
    stn = fxstn.transform(net, example_inputs=torch.randn(4, 6), trace=trace)
    stn.pushforward(torch.randn(4, 6), delta=torch.ones(1))
    assert torch.isfinite(stn(torch.randn(4, 6))).all()


def test_an_operation_that_fails_without_values_leaves_autograd_as_it_was():
    """torch.func.jvp of a quantile of tensors without values, which a check of graphs tries."""

    class Quantile(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.layer(x)
            return self.out(h + torch.quantile(h, 0.3, dim=1, keepdim=True))

    net, x = Quantile().double(), torch.randn(6, 4).double()
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1)], example_inputs=x)
    nn.init.normal_(stn.response.flat_U)
    delta = torch.ones(1).double()
    moved = [functional_call(net, stn.best_response(step * delta), (x,)) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(stn.pushforward(x, delta=delta)[1], (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-8)
    net(x).sum().backward()
    assert torch.func.jvp(torch.sin, (x,), (x,))[1].equal(x * x.cos())


# Functions that close over modules


class Closures(nn.Module):
    """As minGPT's block: functions that read modules of the model, themselves and by another one, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.out, self.drop = (
            nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)]),
            nn.Linear(6, 2),
            nn.Dropout(0.1),
        )
        mlp = self.mlp

        def hidden(x):
            return torch.tanh(mlp[0](x))

        self.mlpf, self.functions = lambda x: self.drop(mlp[1](hidden(x))), [lambda x: self.out(x)]

    def forward(self, x):
        return self.functions[0](x + self.mlpf(x))


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_functions_of_a_model_read_the_modules_of_its_copy(trace):
    torch.manual_seed(0)
    model, x = Closures(), torch.randn(4, 6)
    expected = model.eval()(x)
    stn = fxstn.transform(model, example_inputs=x, trace=trace)
    assert list(stn.hparams.names) == ["drop.dropout"]
    assert fxstn.verify(model, x).ok
    stn.train()(x).square().sum().backward()
    assert all(weight.grad is not None for weight in stn.model.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(stn.eval()(x), expected)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    torch.testing.assert_close(stn(x), expected)
    torch.testing.assert_close(stn.export()(x), expected)


OUTSIDE = nn.Linear(6, 6)


class ReadsOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(OUTSIDE(x)))


def test_a_parameter_that_the_model_does_not_hold_is_refused():
    with pytest.raises(
        fxstn.TransformError, match=r"export: a parameter of shape \(6, 6\) that no module of the model holds"
    ):
        fxstn.transform(ReadsOutside(), example_inputs=torch.randn(4, 6))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_that_the_copy_does_not_have_are_a_warning_and_act_where_it_says(register):
    model, x = mlp(), torch.randn(4, 6)
    getattr(model[0].weight, register)(lambda _: None)
    with pytest.warns(
        UserWarning, match=r"gradients of '0\.weight' stay .*get_parameter\('0\.weight'\)\.register_hook"
    ):
        stn = fxstn.transform(model, SCALAR, example_inputs=x)
    stn.model.get_parameter("0.weight").register_hook(torch.zeros_like)
    fxstn.general_loss(stn, F.mse_loss, x, torch.zeros(4, 3)).backward()
    assert not stn.model[0].weight.grad.any()
    assert stn.model[0].bias.grad.any()
