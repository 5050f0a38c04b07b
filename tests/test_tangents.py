"""Laws 1 and 5: the emitted tangent against the original model, in every mode; rows of a per-example delta."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torchvision import models

import fxstn
from benchmarks.fake_cuda import backward, fake_cuda
from benchmarks.launches import Launches
from fxstn import hp
from fxstn.ops.norms import layer_norm_jacobian
from fxstn.ops.response import Response, align, responses_in
from fxstn.ops.scaled import bias_shift, scaled_tangent, scales_and_shifts
from fxstn.ops.sums import add_product, scaled_layer_norm, scaled_product
from fxstn.rules import RULES
from fxstn.rules.registry import Rule
from tests.nets import Classifier, SmallConv, mlp, randomize_response


def bottleneck_net() -> nn.Module:
    """resnet50's bottleneck blocks, one per stage."""
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


SCALAR = [hp.Scalar("a", 0.5, 0.0, 1.0)]


@pytest.mark.parametrize("make", [bottleneck_net, SmallConv], ids=["bottleneck", "small"])
def test_the_tangent_of_a_network_of_blocks_is_the_derivative_of_the_original(make):
    report = fxstn.verify(make(), torch.randn(4, 3, 32, 32))
    assert report.ok, str(report)


def test_the_tangent_is_exact_where_dropout_is_taken_over_inserted_and_shared():
    x = torch.randn(4, 6)
    for specs in (None, [hp.Dropout("2", "5", shared=True)], [hp.Dropout("input", "0", "2")], [hp.WeightDecay()]):
        report = fxstn.verify(mlp(0.3), x, hparams=specs)
        assert report.ok, f"{specs}\n{report}"


def test_verify_finds_a_wrong_rule(monkeypatch):
    right = RULES[torch.tanh]

    def wrong(tangents, args, kwargs):
        y, dy = right.apply(tangents, args, kwargs)
        return y, dy * 1.001

    monkeypatch.setitem(RULES, torch.tanh, Rule("pointwise", wrong))
    assert not fxstn.verify(mlp(), torch.randn(4, 6)).ok


class PerExampleConv(nn.Module):
    """SmallConv's like with weights given per example, (batch, ...), and batch statistics over the whole batch."""

    @staticmethod
    def run(weights, x, norm):
        def conv(x, w, b):
            return torch.stack([F.conv2d(x[i : i + 1], w[i], b[i], padding=1)[0] for i in range(len(x))])

        h = conv(x, weights["conv.weight"], weights["conv.bias"])
        if norm:
            h = F.batch_norm(h, None, None, None, None, True)
        h = torch.tanh(h).mean((2, 3))
        return torch.einsum("boi,bi->bo", weights["fc.weight"], h) + weights["fc.bias"]


class ConvNormLinear(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, affine=False) if norm else nn.Identity()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.tanh(self.bn(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
def test_unequal_rows_equal_per_example_weights_materialised(norm):
    stn = fxstn.transform(ConvNormLinear(norm).double(), [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)]).train()
    randomize_response(stn)
    x, delta = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 2).double()
    _, dy = stn.pushforward(x, delta=delta)
    weights = {
        name: torch.stack([stn.best_response(row)[name] for row in torch.eye(2).double()])
        for name in ("conv.weight", "conv.bias", "fc.weight", "fc.bias")
    }
    base = dict(stn.model.named_parameters())

    def output(step):
        moved = {}
        for name, w in base.items():
            columns = weights[name] - w  # Θ applied to each unit vector
            moved[name] = w + step * torch.einsum("bh,h...->b...", delta, columns)
        return PerExampleConv.run(moved, x, norm)

    with torch.no_grad():
        difference = (output(1e-6) - output(-1e-6)) / 2e-6
    assert (dy - difference).norm() <= 1e-8 * difference.norm()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(2, 4), training=st.booleans())
def test_row_i_of_a_per_example_delta_is_the_shared_result_for_delta_i(seed, batch, training):
    torch.manual_seed(seed)
    stn = fxstn.transform(SmallConv(norm=False).double(), [hp.Scalar("a", 0.5, 0, 1)] * 1 + [hp.WeightDecay("head")])
    stn.train(training)
    randomize_response(stn)
    x, delta = torch.randn(batch, 3, 8, 8).double(), torch.randn(batch, 2).double()
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(batch):
        _, shared = stn.pushforward(x, delta=delta[i])
        torch.testing.assert_close(rows[i], shared[i], rtol=1e-10, atol=1e-12)


def test_examples_do_not_leak_into_each_other_without_batch_norm():
    stn = fxstn.transform(SmallConv(norm=False).double()).train()
    randomize_response(stn)
    x, epsilon = torch.randn(4, 3, 8, 8).double(), torch.randn(4, len(stn.hparams)).double()
    other = epsilon.clone()
    other[1] += 1.0
    results = []
    for condition in (epsilon, other):
        torch.manual_seed(1)
        results.append(stn.pushforward(x, delta=condition, condition=condition)[1])
    kept = [0, 2, 3]
    assert torch.equal(results[0][kept], results[1][kept])
    assert not torch.equal(results[0][1], results[1][1])


def test_the_tangent_is_linear_in_delta_and_zero_at_zero():
    stn = fxstn.transform(SmallConv().double()).train()
    randomize_response(stn)
    x = torch.randn(4, 3, 8, 8).double()
    a, b = torch.randn(2, 4, len(stn.hparams)).double()

    def dy(delta):
        torch.manual_seed(1)
        return stn.pushforward(x, delta=delta, condition=a)[1]

    torch.testing.assert_close(dy(2 * a - 3 * b), 2 * dy(a) - 3 * dy(b), rtol=1e-9, atol=1e-12)
    assert torch.equal(dy(torch.zeros_like(a)), torch.zeros(4, 5).double())


def test_a_tied_weight_moves_wherever_it_is_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    report = fxstn.verify(Tied(), torch.randn(4, 4), hparams=[hp.WeightDecay("a")])
    assert report.ok, str(report)


def test_outputs_keep_the_models_structure():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            return {"logits": y, "pair": (y.mean(), y.argmax(1)), "input": x}

    stn = fxstn.transform(Several().double(), [hp.Scalar("a", 0.5, 0, 1)])
    randomize_response(stn)
    x = torch.randn(3, 4).double()
    y, dy = stn.pushforward(x, delta=torch.ones(1).double())
    assert y.keys() == dy.keys() == {"logits", "pair", "input"}
    torch.testing.assert_close(dy["pair"][0], dy["logits"].mean())
    assert dy["pair"][1] is None
    assert torch.equal(dy["input"], torch.zeros_like(x))


def test_a_final_softmax_is_linearised_before_it():
    net = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1)])
    randomize_response(stn)
    x, delta = torch.randn(5, 4).double(), torch.randn(5, 1).double()
    bare = fxstn.transform(net[:1], [hp.Scalar("a", 0.5, 0, 1)])
    bare.load_state_dict(stn.state_dict())
    z, dz = bare.pushforward(x, delta=delta)
    torch.testing.assert_close(stn.perturbed_output(x, delta=delta)[0], (z + dz).log_softmax(1))


@pytest.mark.parametrize("method", ["centered", "stn"])
def test_the_other_methods_run_the_network_at_the_weights_of_best_response(method):
    stn = fxstn.transform(SmallConv(norm=False).double(), [hp.Scalar("a", 0.3, 0, 1)], method=method)
    randomize_response(stn)
    x, delta = torch.randn(3, 3, 8, 8).double(), torch.randn(1).double()
    output, _ = stn.perturbed_output(x, delta=delta, training=False)
    expected = functional_call(copy.deepcopy(stn.model).eval(), stn.best_response(delta), x)
    torch.testing.assert_close(output, expected)
    if method == "stn":
        torch.testing.assert_close(stn.eval()(x), stn.export().eval()(x))


def test_a_moved_batch_dimension_is_followed():
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).transpose(0, 1)).transpose(0, 1)

    net, x = TimeMajor(), torch.randn(3, 3, 3)  # equal sizes: only the layout can tell
    stn = fxstn.transform(net, [hp.Dropout("a")]).eval()
    assert stn.per_example(x)
    randomize_response(stn)
    delta = torch.randn(3, 1)
    _, rows = stn.pushforward(x, delta=delta)
    for i in range(3):
        torch.testing.assert_close(rows[i], stn.pushforward(x, delta=delta[i])[1][i])
    assert fxstn.verify(net, x, hparams=[hp.Dropout("a")]).ok
    fxstn.response_loss(stn, F.mse_loss, x, x).backward()
    assert fxstn.transform(Classifier()).per_example(torch.randn(2, 1, 8, 8))


def test_a_plain_batch_leaves_the_graphs_as_they_are():
    stn = fxstn.transform(SmallConv())
    graph = stn.graph("pushforward")
    assert stn.per_example(torch.randn(2, 3, 8, 8))
    assert stn.graph("pushforward") is graph


def test_mixed_examples_refuse_per_example_deltas_and_allow_shared_ones():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).cumsum(0))

    net, x = Mixing(), torch.randn(4, 3)
    stn = fxstn.transform(net, [hp.Dropout("a")]).train()
    with pytest.warns(UserWarning, match="one ε for the whole batch"):
        assert not stn.per_example(x)
    with pytest.raises(ValueError, match=r"module 'b'.*not along one dimension"):
        stn.pushforward(x, delta=torch.zeros(4, 1))
    assert fxstn.verify(net, x, hparams=[hp.Dropout("a")]).ok
    explanation = fxstn.explain(net, [hp.Dropout("b")], x)
    assert "not per example" in str(explanation)
    assert "strength from λ: b.dropout" in str(explanation)
    fxstn.response_loss(stn, F.mse_loss, x, x).backward()


def test_a_response_starts_at_zero_and_has_the_papers_structure():
    stn = fxstn.transform(mlp(), [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)], response="structured")
    responses = {name: m for name, m in stn.response.named_modules() if isinstance(m, Response)}
    assert responses.keys() == dict(stn.model.named_parameters()).keys()
    for name, module in responses.items():
        parameter = stn.model.get_parameter(name)
        assert module.U.shape == (parameter.shape[0], 2)
        assert not module.U.any()
        assert module.R.shape == parameter.shape
    delta = torch.tensor([0.5, -1.0])
    with torch.no_grad():
        responses["0.weight"].U.fill_(2.0)
    change = stn.best_response(delta)["0.weight"] - stn.model[0].weight
    torch.testing.assert_close(change, -1.0 * responses["0.weight"].R)


def test_a_scaled_response_moves_the_units_and_holds_nothing_but_their_scales():
    stn = fxstn.transform(mlp(), [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)])
    assert not stn.structured
    assert all(p.shape[1] == 2 and not p.any() for p in stn.response_parameters())
    with torch.no_grad():
        stn.response.get_submodule("0.weight").U.fill_(2.0)
    moved = stn.best_response(torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(moved["0.weight"], 0.0 * stn.model[0].weight)
    torch.testing.assert_close(moved["6.weight"], stn.model[6].weight)


class Norms(nn.Module):
    """Every norm, the batch norm after a convolution, which it robs of its scale."""

    def __init__(self):
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.ParameterList([torch.ones(4), torch.zeros(4)])
        self.layer, self.rms, self.head = nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.batch(F.avg_pool2d(self.conv(x), 2)))
        x = torch.tanh(F.instance_norm(torch.tanh(self.group(x)), None, None, *self.instance)).mean((2, 3))
        return self.head(torch.tanh(self.rms(torch.tanh(self.layer(x)))))


def norms_and_inputs():
    net = Norms().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(5, 3, 6, 6).double()
    net(x)  # running statistics that are not their start
    return net, x


def test_where_units_are_scaled_norms_respond_and_what_they_normalise_does_not():
    net, _ = norms_and_inputs()
    scaled, structured = (fxstn.transform(net, SCALAR, response=kind) for kind in ("scaled", "structured"))
    named = [set(responses_in(stn.response)) for stn in (scaled, structured)]
    layers = {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert named[0] == dict(net.named_parameters()).keys() - {"conv.weight", "conv.bias"}
    assert named[1] == layers
    assert "a batch norm after it takes its scale away" in str(fxstn.explain(net, SCALAR))


def test_a_batch_norm_that_is_frozen_takes_no_scale_away():
    net, _ = norms_and_inputs()
    net.batch.eval()
    stn = fxstn.transform(net, SCALAR)
    assert {"conv.weight", "batch.weight"} <= responses_in(stn.response).keys()


@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize("training", [False, True])
def test_the_tangent_of_scaled_norms_is_the_derivative_of_the_original(trace, training):
    net, x = norms_and_inputs()
    stn = fxstn.transform(net, SCALAR, trace=trace, example_inputs=x).train(training)
    randomize_response(stn)
    delta, step = torch.tensor([0.3]).double(), 1e-6

    def moved(amount):
        return functional_call(copy.deepcopy(net).train(training), stn.best_response(amount * delta), (x,))

    dy = stn.pushforward(x, delta=delta)[1]
    difference = (moved(step) - moved(-step)) / (2 * step)
    assert (dy - difference).norm() <= 1e-6 * difference.norm()
    if trace == "fx" and not training:
        rows = stn.pushforward(x, delta=torch.linspace(-1, 1, 5).double()[:, None])[1]
        torch.testing.assert_close(rows, torch.linspace(-1, 1, 5).double()[:, None] * dy / 0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "stn", "response": "scaled"}, "is not for method 'stn'; give 'structured'"),
        ({"response": "rows"}, "response='rows' is not one of None, scaled, structured"),
    ],
)
def test_a_scaled_response_is_refused_where_it_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        fxstn.transform(mlp(), **settings)


def test_a_layer_with_one_unit_is_scaled_by_its_inputs():
    """A linear model with one output: any Δw can be told, not only a multiple of w."""
    net = nn.Linear(5, 1).double()
    stn = fxstn.transform(net, [hp.Scalar("a", 0.5, 0, 1)]).eval()
    U = stn.response.get_submodule("weight").U
    assert U.shape == (5, 1)
    randomize_response(stn)
    x, delta = torch.randn(4, 5).double(), torch.tensor([0.3]).double()
    step = 1e-6 * delta
    high, low = (torch.func.functional_call(net, stn.best_response(s), (x,)) for s in (step, -step))
    torch.testing.assert_close(stn.pushforward(x, delta=delta)[1], (high - low) / 2e-6)
    rows = stn.pushforward(x, delta=delta.expand(4, 1))[1]
    torch.testing.assert_close(rows, stn.pushforward(x, delta=delta)[1])


def test_the_scaled_response_of_a_linear_layer_takes_no_product_of_its_own():
    stn = fxstn.transform(mlp(), [hp.Scalar("a", 0.5, 0, 1)])
    products = [n for n in stn.graph("linearized").graph.nodes if n.target in (F.linear, scaled_product)]
    layers = [m for m in stn.model if isinstance(m, nn.Linear)]
    assert len(products) == 2 * len(layers) - 1  # y, and J dx but in the first layer


def test_a_forward_that_rounds_to_float32_is_checked_without_the_rounding():
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.softmax(self.a(x).float(), -1).to(torch.float32)
            return self.b(h.to(x.dtype))

    for trace in ("fx", "export", "live"):
        report = fxstn.verify(Rounding(), torch.randn(3, 4), hparams=[hp.Scalar("a", 0.5, 0, 1)], trace=trace)
        assert report.ok, str(report)


@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((3, 2, 4, 2), -3), ((3, 4, 2), -1), ((3, 2), -1)])
def test_the_tangent_of_a_scaled_layer_has_its_gradients(shape, dim, by_example):
    """Of the first and of the second order; the first is by a fused kernel where the layer's examples and channels lead."""
    tangent, output = (torch.randn(shape).double().requires_grad_() for _ in range(2))
    scale, bias_scale = (torch.randn(2).double().requires_grad_() for _ in range(2))
    if by_example:
        scale, bias_scale = (torch.randn(3, 2).double().requires_grad_() for _ in range(2))
    bias, ends = torch.randn(2).double().requires_grad_(), torch.arange(2.0)
    aligned = lambda v: torch.zeros(()) if v is None else align(v, output, dim)  # noqa: E731

    def moved(known, dx, y, s, b, t):
        return scaled_tangent(dx, y, s, None if b is None else bias_shift(s, b, t), dim, ends=known)

    biases = [(None, None), (bias, None), (bias, bias_scale)]
    for dx, known, (b, of_bias) in itertools.product((tangent, None), (ends, None), biases):
        function = partial(moved, known)
        expected = aligned(scale) * (output - aligned(b)) + aligned(of_bias) * aligned(b) + (0 if dx is None else dx)
        values = (dx, output, scale, b, of_bias)
        torch.testing.assert_close(function(*values), expected)
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_scales_of_a_complex_layer_have_their_gradients():
    """They are real, and so is what the layer's bias shifts by; in a graph, too, where all have one product."""
    tangent, output = (torch.randn(3, 4, 2, dtype=torch.complex128).requires_grad_() for _ in range(2))
    scale, bias_scale = (torch.randn(3, 2).double().requires_grad_() for _ in range(2))
    bias = torch.randn(2, dtype=torch.complex128)
    for ends in (None, torch.arange(2.0)):
        moved = lambda t, y, s, b, ends=ends: scaled_tangent(t, y, s, bias_shift(s, bias, b), -1, ends=ends)  # noqa: E731
        assert torch.autograd.gradcheck(moved, (tangent, output, scale, bias_scale))

    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, dtype=torch.complex128), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.last(self.first(x.to(torch.complex128)).abs())

    stn = fxstn.transform(Rotated(), [hp.Scalar("a", 0.5, 0, 1)]).train()
    nn.init.normal_(stn.response.flat_U)
    x, delta = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    y, dy = stn.pushforward(x, delta=delta)
    together, _ = stn.perturbed_output(x, delta=delta)
    torch.testing.assert_close(together, y + dy)
    gradients = [torch.autograd.grad(z.square().sum(), stn.response.flat_U)[0] for z in (together, y + dy)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_scales_and_shifts_of_all_layers_are_those_of_each(shape):
    """Their values and their gradients, with a bias of its own, one without a response, and weights alone."""
    flat, delta = (torch.randn(n).double().requires_grad_() for n in ((9, 2), shape))
    sizes, pairs, biases = (2, 3, 2, 2), ((0, 2),), (torch.randn(2).double(),)

    def one_by_one(flat, delta):
        scales = nn.functional.linear(delta, flat).split(sizes, -1)
        return (*scales[:2], bias_shift(scales[0], biases[0], scales[2]), scales[3])

    together = lambda flat, delta: scales_and_shifts(flat, delta, sizes, pairs, biases)  # noqa: E731
    torch.testing.assert_close(together(flat, delta), one_by_one(flat, delta))
    assert torch.autograd.gradcheck(together, (flat, delta))
    with torch.autocast("cpu", torch.bfloat16):
        parts = scales_and_shifts(flat, delta, sizes, pairs, biases, (0, 2))
    assert [part.dtype for part in parts] == [torch.bfloat16, torch.float64] * 2
    expected = one_by_one(flat, delta)
    for some in (parts, parts[1:3]):  # a block that nothing reads has no gradient
        (found, _), (wanted, _) = (
            torch.autograd.grad([part.double().square().sum() for part in those], (flat, delta), retain_graph=True)
            for those in (some, expected if len(some) == 4 else expected[1:3])
        )
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rows", [False, True])
def test_sums_of_a_product_and_other_terms_are_those_of_the_single_operations(rows):
    """Their values, and their gradients in the tangent, the scales and the shifts."""
    torch.manual_seed(0)
    x, weight, gain = torch.randn(3, 4, 5).double(), torch.randn(6, 5).double(), torch.randn(5).double()
    normal, mean, inverse_std = torch.native_layer_norm(x, (5,), gain, None, 1e-5)
    y, ends = F.linear(x, weight), torch.tensor([0.0, 1.0]).double()
    single = {
        "product": lambda t, s, b: scaled_tangent(F.linear(t, weight), y, s, b, -1, ends=ends),
        "norm": lambda t, s, b: scaled_tangent(
            layer_norm_jacobian(t, x, gain, mean, inverse_std, (5,)), normal, s, b, -1, ends=ends
        ),
    }
    joint = {
        "product": lambda t, s, b: scaled_product(t, weight, y, s, b, -1, ends=ends),
        "norm": lambda t, s, b: scaled_layer_norm(t, x, gain, mean, inverse_std, (5,), normal, s, b, -1, ends=ends),
    }
    for name, size in (("product", 6), ("norm", 5)):
        scales = [torch.randn(*[3] * rows, size).double().requires_grad_() for _ in range(2)]
        for shift in (scales[1], None):
            arguments = [torch.randn_like(x).requires_grad_(), scales[0], shift]
            sources = [argument for argument in arguments if argument is not None]
            values = [own[name](*arguments) for own in (joint, single)]
            torch.testing.assert_close(*values)
            ours, others = (torch.autograd.grad(value.square().sum(), sources) for value in values)
            for one, other in zip(ours, others, strict=True):
                torch.testing.assert_close(one, other)


def test_a_tangent_that_only_products_read_is_rounded_for_them_and_its_scales_have_wide_gradients():
    x, gain, scale = torch.randn(3, 4, 5), torch.ones(5), torch.zeros(5, requires_grad=True)
    normal, mean, inverse_std = torch.native_layer_norm(x, (5,), gain, None, 1e-5)
    arguments = (x, gain, mean, inverse_std, (5,), normal, scale, scale)
    with torch.autocast("cpu", torch.bfloat16):
        low = scaled_layer_norm(torch.ones_like(x), *arguments, -1, ends=torch.tensor([0.0, 1.0]), lowered=True)
        full = scaled_layer_norm(torch.ones_like(x), *arguments, -1, ends=torch.tensor([0.0, 1.0]))
    assert full.dtype == torch.float32
    assert torch.equal(low, full.bfloat16())
    ours, other = (torch.autograd.grad(value.float().sum(), scale)[0] for value in (low, full))
    torch.testing.assert_close(ours, other)


def test_a_value_times_noise_is_added_in_one_step_where_the_noise_is_a_tensor():
    rest, mask = torch.randn(3, 4), torch.tensor([[0.0], [2.0], [2.0]], dtype=torch.bfloat16)
    value = torch.randn(3, 4).bfloat16().requires_grad_()
    result = add_product(rest, value, mask)
    torch.testing.assert_close(result, rest + value.float() * mask.float())
    (gradient,) = torch.autograd.grad(result.sum(), value)
    assert torch.equal(gradient, mask.expand(3, 4))
    assert torch.equal(add_product(rest, value, 1), rest + value)
    assert add_product(rest[:1], value, mask).shape == (3, 4)


def test_the_gradient_of_the_scales_of_a_map_reads_it_once():
    with fake_cuda(), (launches := Launches()):
        tangent, output = (torch.empty(4, 3, 5, 5, device="cuda") for _ in range(2))
        scale, bias_scale = (torch.empty(4, 3, device="cuda").requires_grad_() for _ in range(2))
        shift = bias_shift(scale, torch.empty(3, device="cuda"), bias_scale)
        loss = scaled_tangent(tangent, output, scale, shift, -3).relu().sum()
        launches.seen.clear()
        with torch.no_grad():
            backward(loss)
    assert launches.seen["native_group_norm_backward"] == launches.seen["mul"] == 1  # the product is of the bias
    assert not launches.unlike


NORMS = {
    "layer norm over 3": lambda: nn.LayerNorm((4, 3, 3)),
    "layer norm over 2": lambda: nn.LayerNorm((3, 3)),
    "without a bias": lambda: nn.LayerNorm((4, 3, 3), bias=False),
    "rms norm over 3": lambda: nn.RMSNorm((4, 3, 3)),
    "rms norm over 1": lambda: nn.RMSNorm(3),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("name", NORMS)
def test_weights_of_norms_of_any_shape_respond_and_the_tangent_is_a_central_difference(name, trace):
    """With the response that is the default, for one δ and for one per example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), NORMS[name](), nn.Tanh(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, 2))
    net, x = net.double().eval(), torch.randn(5, 2, 5, 5).double()
    nn.init.normal_(net[1].weight)
    stn = fxstn.transform(net, example_inputs=x, trace=trace).eval()
    assert len(stn.response.flat_responses) == len(list(net.parameters()))
    nn.init.normal_(stn.response.flat_U)
    delta = torch.randn(5, len(stn.hparams)).double()
    rows = []
    for one in delta:
        moved = lambda step, one=one: functional_call(net, stn.best_response(step * one), (x,))  # noqa: E731
        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        _, tangent = stn.pushforward(x, delta=one)
        torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
        rows.append(tangent)
    _, tangent = stn.pushforward(x, delta=delta)
    torch.testing.assert_close(tangent, torch.stack([row[i] for i, row in enumerate(rows)]), rtol=1e-9, atol=1e-9)
