"""The live frontend: forwards that no graph can hold, with tangents carried beside them."""

from __future__ import annotations

import copy
import dataclasses
import operator
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxstn
from fxstn import hp
from fxstn.frontends.live import tracer
from fxstn.frontends.live.calls import Call, mutated
from fxstn.ir.containers import leaves, tensors_in
from fxstn.ir.spelling import Unspellable, respell
from fxstn.ir.tangents import ZERO
from fxstn.ops.regions import region_shift
from fxstn.rules import RULES, Rule, apply_rule
from tests.nets import Classifier, SmallConv, mlp, randomize_response

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
def mask_by_vmap(net, x):
    """As transformers make their attention masks."""
    h = net.a(x)
    mask = torch.vmap(lambda i: i.new_ones((), dtype=torch.bool) & (i > 0))(torch.arange(h.shape[-1]))
    return net.b(torch.tanh(h) * mask)


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


@body
def conversions(net, x):
    h = net.a(x).type(torch.float64).to(x).type_as(x)
    assert h.type() == "torch.DoubleTensor"
    if torch.is_grad_enabled():
        h.retain_grad()
        h.register_hook(lambda gradient: gradient * 2).remove()
    assert h.shape == x.shape
    return torch.view_as_real(torch.complex(h.T, h.mT.exp()))


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


def batch_norm_statistics():
    return torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), True, 0.1, 1e-5


OPERATIONS = {
    "method in place": (torch.Tensor.mul_, lambda: (torch.ones(3), 2), {}),
    "draw in place": (torch.Tensor.normal_, lambda: (torch.ones(3),), {}),
    "not in place": (torch.Tensor.mul, lambda: (torch.ones(3), 2), {}),
    "inplace argument": (F.relu, lambda: (torch.ones(3), True), {}),
    "operator": (operator.iadd, lambda: (torch.ones(3), torch.ones(3)), {}),
    "setitem": (torch.Tensor.__setitem__, lambda: (torch.ones(3), 0, torch.ones(())), {}),
    "out": (torch.add, lambda: (torch.ones(3), torch.ones(3)), lambda: {"out": torch.ones(3)}),
    "outs": (torch.max, lambda: (torch.ones(2, 3), 0), lambda: {"out": (torch.ones(3), torch.ones(3).long())}),
    "foreach": (torch._foreach_add_, lambda: ([torch.ones(3), torch.ones(2)], 1), {}),
    "foreach not in place": (torch._foreach_add, lambda: ([torch.ones(3), torch.ones(2)], 1), {}),
    "overload": (torch.ops.aten.add_.Tensor, lambda: (torch.ones(3), torch.ones(3)), {}),
    "packet": (torch.ops.aten.mul_, lambda: (torch.ones(3), torch.ones(3)), {}),
    "out overload": (torch.ops.aten.add.out, lambda: (torch.ones(3), torch.ones(3)), lambda: {"out": torch.ones(3)}),
    "second argument": (
        torch.ops.aten._native_batch_norm_legit,
        lambda: (torch.randn(4, 3), *batch_norm_statistics()),
        {},
    ),
    "resized": (torch.Tensor.resize_, lambda: (torch.ones(3), (5,)), {}),
    "gradient flag": (torch.Tensor.requires_grad_, lambda: (torch.ones(3),), {}),
    "python method": (torch.Tensor.share_memory_, lambda: (torch.ones(3),), {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_writes_into_the_tensors_whose_version_or_values_change(name):
    """The kernel of batch norm raises no version."""
    function, make_args, make_kwargs = OPERATIONS[name]
    args, kwargs = make_args(), make_kwargs() if make_kwargs else {}
    try:
        spelled = respell(function, args, kwargs)
    except Unspellable:
        spelled = None
    before = [(x, x._version, x.clone()) for x in tensors_in((args, kwargs))]
    targets = mutated(Call(function, args, kwargs, spelled))
    function(*args, **kwargs)
    changed = [x for x, version, value in before if x._version > version or not torch.equal(x, value)]
    assert sorted(map(id, targets)) == sorted(map(id, changed))


def test_verify_finds_a_wrong_rule_and_a_lost_tangent(monkeypatch):
    right = RULES[torch.tanh]

    def wrong(tangents, args, kwargs):
        y, dy = right.apply(tangents, args, kwargs)
        return y, dy * 1.001

    for broken in (wrong, RULES[torch.detach].apply):
        monkeypatch.setitem(RULES, torch.tanh, Rule("pointwise", broken))
        assert not fxstn.verify(Net(loop_until_small), torch.randn(4, 6), hparams=SCALAR, trace="live").ok


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


def tiny_conv():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


class Attentive(nn.Module):
    """Attention and stochastic depth with dropout of their own, in a network that symbolic tracing can follow."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = x.unflatten(1, (-1, 8))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = torchvision.ops.stochastic_depth(h * h, 0.3, "row", self.training)
        return F.log_softmax(self.head(h.mean(1)), 1)


TRACED = {
    "mlp": (lambda: mlp(0.3), (4, 6), None),
    "functional dropout": (Classifier, (4, 1, 8, 8), None),
    "inserted in stages": (SmallConv, (4, 3, 16, 16), None),
    "inserted": (lambda: mlp(0.3), (4, 6), [hp.Dropout("input", "0", "2", "4"), hp.WeightDecay()]),
    "inserted around all": (lambda: mlp(0.3), (4, 6), [hp.Dropout("")]),
    "batch norm": (tiny_conv, (4, 3, 32, 32), None),
    "attention": (Attentive, (4, 16), None),
}


@pytest.mark.parametrize("name", TRACED)
def test_the_live_frontend_computes_what_the_traced_frontend_computes(name):
    """Same hyperparameters, same noise, same output, tangent, linearised output, gradients and running statistics."""
    make, shape, specs = TRACED[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape).double()
    names, results = [], []
    for frontend in ("fx", "live"):
        torch.manual_seed(1)
        stn = fxstn.transform(model, specs, example_inputs=x, trace=frontend)
        assert stn.frontend == frontend
        randomize_response(stn)
        epsilon = 0.3 * torch.randn(len(stn.hparams)).double()
        names.append(stn.hparams.names)
        values = []
        for training in (True, False):
            stn.train(training)
            values += [seeded(stn.pushforward, x, delta=epsilon, condition=epsilon), seeded(stn, x)]
        for method in ("delta", "centered"):
            stn.method = method
            for loss in (fxstn.general_loss, fxstn.response_loss):
                seeded(loss, stn, cross, x, torch.arange(4) % 3, perturb="batch").backward()
        values.append([parameter.grad for parameter in stn.parameters()])
        values.append([buffer.clone() for buffer in stn.buffers()])
        results.append(values)
    assert names[0] == names[1]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


def cross(output, target):
    return F.cross_entropy(output, target)


@pytest.mark.parametrize("method", ["centered", "stn"])
def test_the_perturbed_methods_run_at_the_predicted_weights(method):
    x, delta = torch.randn(4, 6).double(), torch.randn(2).double()
    stn = live(Net(loop_until_small).double(), x, method=method)
    weights = stn.best_response(delta)
    expected = torch.func.functional_call(stn.model, weights, (x,))
    torch.testing.assert_close(stn.perturbed_output(x, delta=delta)[0], expected)
    if method == "stn":
        torch.testing.assert_close(stn(x), torch.func.functional_call(stn.model, stn.best_response(0 * delta), (x,)))
        before = [*stn.model.parameters()]
        fxstn.general_loss(stn, cross, x, torch.arange(4)).backward()
        assert all(one is other for one, other in zip(stn.model.parameters(), before, strict=True))
        assert all(parameter.grad is not None for parameter in (*stn.model.parameters(), *stn.response_parameters()))


def test_a_final_softmax_is_linearised_before_it_through_views_and_dicts():
    def body(net, x):
        h = net.b(net.a(x).relu())
        return {"p": F.softmax(h, 1)[:, 1:], "q": torch.sigmoid(h), "z": h}

    x, delta = torch.randn(4, 6).double(), torch.randn(2).double()
    stn = live(Net(body).double(), x)
    y, dy = stn.pushforward(x, delta=delta)
    output, _ = stn.perturbed_output(x, delta=delta)
    z = y["z"] + dy["z"]
    torch.testing.assert_close(output, {"p": z.softmax(1)[:, 1:], "q": z.sigmoid(), "z": z})


def test_the_response_step_leaves_weights_statistics_and_attributes_alone():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn, self.calls, self.seen = nn.Linear(6, 6), nn.BatchNorm1d(6), 0, []

        def forward(self, x):
            self.calls += 1
            self.last = self.bn(self.fc(x))
            return torch.tanh(self.last) if self.calls else self.last

    x = torch.randn(4, 6)
    stn = live(Stateful(), x).train()
    before, calls = copy.deepcopy(stn.model.state_dict()), stn.model.calls
    fxstn.response_loss(stn, cross, x, torch.arange(4)).backward()
    stn.pushforward(x, delta=torch.zeros(2))
    torch.testing.assert_close(stn.model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in stn.general_parameters())
    assert any(parameter.grad is not None for parameter in stn.response_parameters())
    assert (stn.model.calls, hasattr(stn.model, "last")) == (calls, False)
    fxstn.general_loss(stn, cross, x, torch.arange(4)).backward()
    assert stn.model.calls == calls + 1
    assert not torch.equal(stn.model.bn.running_mean, before["bn.running_mean"])
    assert all(parameter.grad is not None for parameter in stn.general_parameters())


def test_transform_and_the_response_step_write_into_nothing_that_they_were_given():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.memory = nn.Linear(6, 6), [torch.zeros(6)]

        def forward(self, x):
            x.mul_(2)
            self.memory[0].add_(x.mean(0))
            h = self.fc(x) * self.memory[0]
            x.sub_(h)
            return x

    x, delta = torch.randn(4, 6), torch.ones(2)
    given = x.clone()
    stn = live(Memory(), x)
    y, dy = stn.pushforward(x, delta=delta)
    torch.testing.assert_close(x, given, rtol=0, atol=0)
    assert not stn.model.memory[0].any()
    assert not torch.equal(y, given)
    torch.testing.assert_close(stn.graph("linearized")(x, delta=delta), y + dy)
    torch.testing.assert_close(stn(x), y)
    assert stn.model.memory[0].any()
    torch.testing.assert_close(x, y)  # as the original does


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_train_as_without_checkpoints(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, checkpoints):
            super().__init__()
            self.inner, self.outer, self.checkpoints = mlp(0.4), nn.Linear(3, 3), checkpoints

        def forward(self, x):
            x = x.clone().requires_grad_()
            if self.checkpoints:
                return self.outer(checkpoint(self.inner, x, use_reentrant=reentrant))
            return self.outer(self.inner(x))

    x, results = torch.randn(4, 6), []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        stn = live(Checkpointed(checkpoints), x, hparams=[hp.Dropout()]).train()
        for loss in (fxstn.general_loss, fxstn.response_loss):
            seeded(loss, stn, cross, x, torch.arange(4) % 3).backward()
        results.append([parameter.grad for parameter in stn.parameters()])
    torch.testing.assert_close(*results)


def test_hooks_fire_and_their_changes_are_followed():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.a.register_forward_hook(lambda module, inputs, output: output * output)
            self.b.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))

        def forward(self, x):
            return self.b(self.a(x))

    checked(Hooked(), torch.randn(4, 6))


def test_the_strength_of_dropout_follows_lambda_wherever_the_forward_goes():
    """A module called more often than in the recorded run goes on with its λ; p near 1 drops everything."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x, times=1):
            for _ in range(times):
                x = self.drop(F.dropout(self.fc(x), 0.0, self.training))
            return x

    x = torch.randn(4, 6)
    stn = live(Repeated(), x, hparams=[hp.Dropout("drop")]).train()
    names = stn.hparams.names
    with torch.no_grad():
        stn.hparams.unconstrained.fill_(20.0)
    assert (names, stn.frontend) == (("drop.dropout",), "live")
    dropped = [seeded(stn.graph("train"), x, times=times).eq(0).float().mean() for times in (1, 3)]
    assert min(dropped) > 0.8
    both = seeded(stn.graph("pushforward"), x, times=3, delta=torch.ones(1))
    torch.testing.assert_close(both[0], seeded(stn.graph("train"), x, times=3))


def test_a_network_with_lists_of_dicts_trains_through_the_three_losses():
    class Detector(nn.Module):
        """Losses in train mode, a list of dicts in eval mode."""

        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(0.2)

        def forward(self, images, targets=None):
            boxes = [self.drop(self.fc(image)) for image in images]
            if self.training:
                pairs = zip(boxes, targets, strict=True)
                return {"box": sum(F.smooth_l1_loss(box, target["boxes"]) for box, target in pairs)}
            return [{"boxes": box, "labels": box.argmax(1)} for box in boxes]

    images = [torch.randn(2, 4), torch.randn(3, 4)]
    targets = [{"boxes": torch.randn(2, 4)}, {"boxes": torch.randn(3, 4)}]
    checked(Detector(), images, targets, hparams=[hp.Dropout()])
    stn = live(Detector(), images, targets, hparams=[hp.Dropout()])
    total = lambda output, target: sum(output.values())  # noqa: E731
    for loss in (fxstn.general_loss, fxstn.response_loss):
        loss(stn.train(), total, (images, targets), None).backward()
    scores = lambda output, target: sum(o["boxes"].square().mean() for o in output)  # noqa: E731
    fxstn.hyper_loss(stn.eval(), scores, (images, targets), None).backward()
    assert all(parameter.grad is not None for parameter in stn.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_live_network_computes_the_same(how):
    x = torch.randn(4, 6)
    stn = live(nn.Sequential(mlp(0.3), nn.Tanh()), x, hparams=[hp.Dropout()])
    other = copy.deepcopy(stn) if how == "deepcopy" else pickle.loads(pickle.dumps(stn))
    delta = torch.ones(len(stn.hparams))
    results = [seeded(network.pushforward, x, delta=delta) for network in (stn, other)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    torch.testing.assert_close(seeded(stn.pushforward, x, delta=delta), results[0], rtol=0, atol=0)


def test_weights_moved_in_place_of_the_own_ones_are_moved_for_the_whole_batch():
    x = torch.randn(4, 6)
    stn = live(mlp(0.3), x, hparams=[hp.Dropout()], method="centered").train()
    graph = stn.graph("pushforward")
    assert "tangents carried beside it" in repr(graph)
    assert "def forward(self, input)" in graph.code
    assert not stn.per_example(x)
    with pytest.raises(ValueError, match="one perturbation per example is refused"):
        stn.perturbed_output(x, delta=torch.zeros(4, len(stn.hparams)))


CONSTANT = torch.ones(6)


def scripted(net, x):
    return net.a(F.relu(SCRIPT(net.a(x))))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and still around
    SCRIPT = torch.jit.trace(lambda x: x * 2 + 1, torch.randn(4, 6))


def add_to_the_weights(net, x):
    with torch.no_grad():
        net.a.weight.mul_(0.9)
    return net.a(x)


def through_detached_memory(net, x):
    h = net.a(x)
    h.data.clamp_(-1, 1)
    return h


def clamp_without_gradients(net, x):
    h = net.a(x)
    with torch.no_grad():
        h.clamp_(-1, 1)
    return h


REFUSED = {
    "scripted": (scripted, "F.relu gets a tensor of shape (4, 6) that no torch operation"),
    "numpy": (lambda net, x: net.b(torch.from_numpy(net.a(x).detach().numpy() * 2)), "no torch operation"),
    "constant": (lambda net, x: net.a(x) * CONSTANT, "register constants as buffers"),
    "number": (lambda net, x: net.a(x) * net.b(x).mean().item(), "item of a value that varies"),
    "weights": (add_to_the_weights, "changes '1.a.weight', of the model itself"),
    "data": (through_detached_memory, "detached alias"),
    "no_grad": (clamp_without_gradients, "in place and without gradients"),
    "no rule": (lambda net, x: torch.histc(net.a(x)), "torch.histc has no tangent rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_place(name):
    body, message = REFUSED[name]
    with pytest.raises(fxstn.TransformError, match=re.escape(message)) as caught:
        fxstn.transform(nn.Sequential(nn.Identity(), Net(body)), SCALAR, example_inputs=torch.rand(4, 6), trace="live")
    (problem,) = caught.value.problems
    assert problem.where.startswith("1")
    assert "test_live.py:" in problem.source


def test_what_no_frontend_follows_lists_the_problems_of_each():
    with pytest.raises(fxstn.TransformError) as caught:
        fxstn.transform(Net(REFUSED["numpy"][0]), SCALAR, example_inputs=torch.rand(4, 6))
    assert {problem.frontend for problem in caught.value.problems} == {"fx", "export", "live"}
    with pytest.raises(ValueError, match="needs example_inputs"):
        fxstn.transform(Net(scripted), SCALAR, trace="live")


def test_explain_lists_what_a_forward_did_and_why_it_is_followed_this_way():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), Net(loop_until_small), nn.Dropout(0.1))
    explanation = fxstn.explain(net, [hp.Dropout("1")], example_inputs=torch.randn(4, 6))
    rows = [(row.module, row.operation, row.rule) for row in explanation.rows]
    assert ("2.b", "F.linear", "hyperlayer") in rows
    assert ("2", "torch.tanh", "pointwise") in rows
    assert ("1", "dropout", "conditioned") in rows
    assert ("3", "dropout", "fixed noise") in rows
    notes = "\n".join(explanation.notes)
    assert "trace='live'" in notes
    assert "not by trace='fx': symbolic tracing cannot follow the forward" in notes


def test_roi_align_moves_with_its_boxes():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 7, 9).double()
    boxes = 8 * torch.rand(6, 5).double() - 1
    boxes[:, 3:] = boxes[:, 1:3] + 8 * torch.rand(6, 2)
    boxes[:, 0] = torch.arange(6) % 2
    tangent = torch.randn(6, 5).double() * torch.tensor([0, 1, 1, 1, 1])
    for ratio, aligned in ((2, True), (2, False), (0, True), (0, False)):
        settings = (0.9, 2, 3, ratio, aligned)
        align = lambda b: torch.ops.torchvision.roi_align(image, b, *settings)  # noqa: B023, E731
        _, dy = apply_rule(torch.ops.torchvision.roi_align, (ZERO, tangent), (image, boxes, *settings), {})
        difference = (align(boxes + 1e-6 * tangent) - align(boxes - 1e-6 * tangent)) / 2e-6
        torch.testing.assert_close(dy, difference, rtol=1e-6, atol=1e-8)
        shift = lambda t: region_shift(t, image, boxes, *settings)  # noqa: B023, E731
        assert torch.autograd.gradcheck(shift, (tangent.requires_grad_(),))
        tangent = tangent.detach()


@pytest.mark.parametrize("calls", [1, 2])
def test_each_result_of_a_module_is_dropped_once(calls, monkeypatch):
    """A module with two results, or called twice, has two places for one dropout, and each draws its own mask."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return (self.layer(x), 2 * self.layer(x)) if calls == 1 else self.layer(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.head = Two(), nn.Linear(4, 1)

        def forward(self, x):
            a, b = self.two(x) if calls == 1 else (self.two(x), self.two(2 * x))
            return self.head(a + b)

    drawn = []
    x = torch.randn(5, 4)
    stn = fxstn.transform(Net(), [hp.Dropout("two")], example_inputs=x, trace="live")
    mask = tracer.dropout_mask
    monkeypatch.setattr(tracer, "dropout_mask", lambda *given: drawn.append(mask(*given)) or drawn[-1])
    stn(x)
    assert len(drawn) == 2
