"""torch.export follows what symbolic tracing refuses: the same graph conventions, nothing lost, any batch size."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

import fxstn
from fxstn import hp
from fxstn.frontends.export import Export
from fxstn.frontends.inputs import Inputs, InputSpec
from fxstn.frontends.symbolic import Symbolic
from fxstn.ir.node_info import info_of
from fxstn.ops.noise import dropout_mask, track_batch
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.simplify import simplify
from tests.nets import Double, SmallConv, randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0.0, 1.0)]


class Body(nn.Module):
    """Linear layers, a batch norm, an embedding, and any forward."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.same, self.drop, self.constant = nn.Identity(), nn.Dropout(0.3), torch.linspace(-1, 1, 6)
        self.register_buffer("mean", torch.randn(6))
        self.body = body

    def forward(self, x, *rest):
        return self.body(self, x, *rest)


def branch(s, x):
    return s.b(torch.tanh(s.a(x))) if x.shape[1] % 2 == 0 else x


def asserted(s, x):
    assert x.shape[1] == 6
    torch._assert(x.dim() == 2, "a matrix")
    if x.dim() == 2:
        x = x[:, None]
    return s.b(s.a(x)).flatten(1)


def loop(s, x):
    total = 0
    for i in range(x.shape[1]):
        total = total + x[:, i : i + 1] * s.a.weight[i]
    return s.b(total)


def pieces(s, x):
    h = torch.tanh(s.a(x))
    return s.b(
        torch.cat([h[:, i : i + n] * (i + 1) for i, n in zip((0, 2, 4), [2] * (x.shape[1] // 2), strict=True)], 1)
    )


def while_loop(s, x):
    h, width = s.a(x), x.shape[1]
    while width > 2:
        h, width = torch.tanh(s.b(h)), width // 2
    return h


def normalised(s, x):
    return s.b(s.norm(s.a(x))) if len(x.shape) == 2 else x


def twice_normalised(s, x):
    return s.b(s.norm(torch.tanh(s.norm(s.a(x))))) if len(x.shape) == 2 else x


def in_place(s, x):
    h = F.relu(s.a(x), inplace=x.shape[1] == 6)
    h += 1
    h.mul_(2).clamp_(min=-1)
    return s.b(h)


def assigned(s, x):
    h = s.a(x)
    h[:, 0] = 0.5 if x.shape[1] == 6 else 1.0
    h[..., 1:3] *= 2
    h[:, 3:][x[:, 3:] > 0] = 0.1
    return s.b(h)


def sizes(s, x):
    n = x.shape[0]
    h = s.a(x).reshape(n, 3, -1) if x.shape[1] % 3 == 0 else x
    return s.b(h.flatten(1)) * (n * 2 // 3) / (1.5 * n) ** 0.5 + torch.sym_max(n, 3)


def outputs(s, x):
    h = torch.tanh(s.a(x)) if x.shape[1] == 6 else x
    return {"deep": [s.b(h), (h, s.mean)], "plain": x, "width": x.shape[1]}


def constants(s, x):
    table = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=x.dtype) if x.shape[1] == 6 else 1
    return s.b(s.a(x) * table + s.mean + torch.arange(6, device=x.device) + x.new_ones(x.shape[0], 1))


def attributes(s, x):
    return s.b(s.a(x) + s.constant.to(x.dtype)) if x.shape[1] == 6 else x


def without_autocast(s, x):
    with torch.autocast("cpu", enabled=False):
        h = s.a(x) if x.shape[1] == 6 else x
    return s.b(torch.tanh(h))


def flat(s, x):
    h = s.a(x).view(x.shape[0] * 2, -1) if x.shape[1] % 2 == 0 else x
    return s.b(torch.tanh(h).reshape(-1, 6))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x))) if x.shape[1] == 6 else x


class Dropped(nn.Module):
    """A branch on sizes in a network of modules, some of them called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2))
        self.block, self.out = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(x.shape[1] // 3):
            x = self.block(x) + x
        return self.out(F.dropout(x, 0.1, self.training))


FOLLOWED = [branch, asserted, loop, pieces, while_loop, normalised, twice_normalised, in_place, assigned, sizes, outputs,
            constants, attributes, without_autocast, flat]  # fmt: skip


class Shared(nn.Module):
    """A module under two names, and an assignment-free forward that branches on sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.steps = nn.ModuleList([self.first, nn.Linear(6, 6)])

    def forward(self, x):
        for step in self.steps if x.shape[1] == 6 else []:
            x = step(x)
        return self.first(x)


MODELS = {
    **{body.__name__: lambda body=body: Body(body) for body in FOLLOWED}, "tied": Tied, "dropped": Dropped,
    "shared": Shared,
}  # fmt: skip


def by_both_modes(net):
    examples = InputSpec.of(net, Inputs((torch.randn(4, 6),), {}))
    return [(mode, simplify(canonicalize(Export(examples).capture(net, mode)))) for mode in (True, False)]


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_tracing_refuses_it(name):
    with pytest.raises(fxstn.TransformError):
        fxstn.transform(MODELS[name](), SCALAR)


@pytest.mark.parametrize("name", MODELS)
def test_the_tangent_is_the_derivative_of_the_original(name):
    report = fxstn.verify(MODELS[name](), torch.randn(4, 6), hparams=SCALAR, trace="export")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_and_counts_as_the_original_for_another_batch_size(name):
    torch.manual_seed(0)
    net, x = MODELS[name](), torch.randn(7, 6)
    for mode, graph in by_both_modes(net):
        original = copy.deepcopy(net).train(mode)
        results = []
        for module in (original, graph):
            torch.manual_seed(1)
            results.append(module(x))
        assert isinstance(results[1], dict) if isinstance(results[0], dict) else type(results[0]) is type(results[1])
        for a, b in zip(*map(tree_leaves, results), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
        for (key, a), b in zip(original.named_buffers(), net.buffers(), strict=True):
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", MODELS)
def test_parameters_keep_their_names(name):
    net = MODELS[name]()
    stn = fxstn.transform(net, SCALAR, example_inputs=torch.randn(4, 6), trace="export")
    names = [name for name, _ in net.named_parameters()]
    assert list(stn.best_response(torch.ones(1))) == names
    read = {n.target.removeprefix("model.") for n in stn.graph("train").graph.nodes if n.op == "get_attr"}
    assert {name for name in read if not name.startswith("constants.")} <= {n for n, _ in net.named_parameters()} | {
        n for n, _ in net.named_buffers()
    } | {"constant"}
    assert all(n.op != "call_method" and "aten" not in str(n.target) for n in stn.graph("train").graph.nodes)


class FollowedByBoth(nn.Module):
    """What both frontends follow: repeated and nested calls, an identity, a leaf batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.1))
        self.mark, self.tail = nn.Identity(), nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2))

    def forward(self, x):
        return self.tail(self.mark(self.block(self.block(x)) + x))


@pytest.mark.parametrize("net", [FollowedByBoth(), SmallConv()], ids=["symbolic", "conv"])
def test_both_frontends_make_the_same_graph(net):
    x = torch.randn(4, 6) if isinstance(net, FollowedByBoth) else torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        export = canonicalize(Export(InputSpec.of(net, Inputs((x,), {}))).capture(net, mode))
        symbolic = canonicalize(Symbolic().capture(net, mode))

        def described(module):
            return [
                (node.target, [call[1:] for call in info_of(node).scope], [call[1:] for call in info_of(node).exits])
                for node in module.graph.nodes
                if node.op == "call_function" and info_of(node).exits
            ]

        assert described(export) == described(symbolic)
        torch.manual_seed(0)
        first = simplify(export)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(first, simplify(symbolic)(x))


def test_a_batch_norm_counts_and_averages_cumulatively():
    net = Body(normalised)
    net.norm.momentum = None
    graph = by_both_modes(net)[0][1]
    assert [n.args[1] for n in graph.graph.nodes if n.target is track_batch] == [None]
    twin = copy.deepcopy(net).train()
    for x in torch.randn(3, 5, 6):
        graph(x), twin(x)
    assert net.norm.num_batches_tracked == 3
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)
    assert net.norm.momentum is None


def test_dropout_is_taken_over_and_inserted_after_modules():
    x = torch.randn(4, 6)
    stn = fxstn.transform(Dropped(), example_inputs=x)
    assert stn.hparams.names == ("stem.2.dropout", "dropout")
    stn = fxstn.transform(Dropped(), [hp.Dropout("stem", "block")], example_inputs=x)
    assert (
        sum(n.target is dropout_mask for n in stn.graph("train").graph.nodes) == 5
    )  # block twice, stem, two of its own
    assert fxstn.verify(Dropped(), x, hparams=[hp.Dropout("block", init=0.2)]).ok
    net = Body(lambda s, x: s.b(s.same(s.a(x))) if x.shape[1] == 6 else x)
    stn = fxstn.transform(net, [hp.Dropout("same", init=0.9)], example_inputs=x, trace="export").train()
    assert (stn.conditioned_output(x)[0] != net(x)).any()


@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_every_kind_of_dropout_is_found(kind):
    net = nn.Sequential(nn.Conv1d(3, 3, 1), kind(0.4), nn.Flatten())
    x = torch.randn(4, 3, 5)
    if kind is nn.Dropout2d:
        net, x = nn.Sequential(nn.Conv2d(3, 3, 1), kind(0.4), nn.Flatten()), x[..., None]
    graphs = [fxstn.transform(net, example_inputs=x, trace=frontend).train() for frontend in ("fx", "export")]
    assert graphs[0].hparams.values() == graphs[1].hparams.values()
    results = []
    for stn in graphs:
        torch.manual_seed(0)
        results.append(stn(x))
    assert torch.equal(*results)


ATTENTION = {
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2),
}


class Attending(nn.Module):
    def __init__(self, inner, need_weights):
        super().__init__()
        self.inner, self.out, self.need_weights = inner, nn.Linear(6, 2), need_weights

    def forward(self, x):
        if isinstance(self.inner, nn.MultiheadAttention):
            y, weights = self.inner(x, x, x, need_weights=self.need_weights)
            return self.out(y), weights
        return self.out(self.inner(x))


@pytest.mark.parametrize(("name", "need_weights"), [(name, False) for name in ATTENTION] + [("attention", True)])
def test_attention_is_followed(name, need_weights):
    net = Attending(ATTENTION[name](), need_weights)
    report = fxstn.verify(net, torch.randn(3, 5, 6), hparams=SCALAR, trace="export")
    assert report.ok, str(report)


def test_attention_drops_as_by_symbolic_tracing():
    net, x = Attending(nn.TransformerEncoderLayer(6, 2, 8, 0.3, batch_first=True), False), torch.randn(3, 5, 6)
    outputs = []
    for frontend in ("fx", "export"):
        torch.manual_seed(0)
        outputs.append(fxstn.transform(net, example_inputs=x, trace=frontend).train()(x))
    torch.testing.assert_close(*outputs)


def test_recurrent_layers_are_followed_and_left_as_they_were():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 5, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0] if x.shape[1] > 2 else x

    net, x = Recurrent(), torch.randn(4, 3, 6)
    weights = list(net.lstm._flat_weights)
    graph = simplify(canonicalize(Export(InputSpec.of(net, Inputs((x[:2],), {}))).capture(net, True)))
    torch.testing.assert_close(graph(x), net(x))
    assert all(a is b for a, b in zip(net.lstm._flat_weights, weights, strict=True))


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, pair, *more, mask=None, scale=2.0):
        h = self.fc(pair["x"] * pair["y"][0]) * scale if pair["x"].shape[1] == 6 else pair["x"]
        for extra in more:
            h = h + extra
        return h if mask is None else h * mask


def test_inputs_keep_their_structure():
    net, one = Structured(), lambda n: ({"x": torch.randn(n, 6), "y": [torch.randn(n, 6)]}, torch.randn(n, 6))
    stn = fxstn.transform(net, SCALAR, example_inputs=one(4), trace="export")
    x = one(5)
    torch.testing.assert_close(stn(*x), net(*x))
    randomize_response(stn)
    assert stn.pushforward(*x, delta=torch.ones(1))[1].abs().sum() > 0


def test_an_example_batch_of_one_stands_for_any():
    stn = fxstn.transform(MODELS["branch"](), SCALAR, example_inputs=torch.randn(1, 6), trace="export")
    for n in (1, 2, 5):
        x = torch.randn(n, 6)
        torch.testing.assert_close(stn(x), stn.model(x))


def test_other_sizes_and_other_constants_than_the_examples_are_refused_at_run_time():
    stn = fxstn.transform(MODELS["normalised"](), SCALAR, example_inputs=torch.randn(4, 6), trace="export")
    said = r"input 'x' has shape \(4, 5\), but the network was exported with \(batch, 6\); .*for these sizes: torch.exp"
    with pytest.raises(ValueError, match=said):
        stn(torch.randn(4, 5))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, scale=1.0, mask=None):
            h = self.fc(x) * scale if x.shape[1] == 6 else x
            return h if mask is None else h * mask

    x = torch.randn(4, 6)
    stn = fxstn.transform(Scaled(), SCALAR, example_inputs=(x, 2.0, None), trace="export")
    torch.testing.assert_close(stn(x, 2.0, None), stn.model(x, 2.0))
    with pytest.raises(ValueError, match=r"input 'scale' is 3.0, but the network was exported with 2.0"):
        stn(x, 3.0, None)
    with pytest.raises(ValueError, match=r"input 'mask' is a tensor"):
        stn(x, 2.0, x)


def test_graphs_are_made_again_after_a_copy_in_another_precision():
    stn = fxstn.transform(MODELS["dropped"](), SCALAR, example_inputs=torch.randn(4, 6), trace="export").eval()
    twin = pickle.loads(pickle.dumps(stn)).double()
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(twin(x), twin.model(x))


@pytest.mark.parametrize("name", ["constants", "dropped", "twice_normalised"])
def test_a_graph_follows_its_inputs_to_another_device(name):
    stn = fxstn.transform(MODELS[name](), SCALAR, example_inputs=torch.randn(4, 6), trace="export").to("meta")
    assert stn(torch.randn(5, 6, device="meta")).device.type == "meta"


def without_gradient(s, x):
    with torch.no_grad():
        scale = s.a(x).exp()
    return s.b(x) * scale


def with_gradient_inside(s, x):
    with torch.no_grad():
        scale = s.a(x).exp()
        with torch.enable_grad():
            y = s.b(x) * scale
        scale = s.a(y)
    return y * scale


@pytest.mark.parametrize("body", [without_gradient, with_gradient_inside])
def test_a_region_without_gradient_is_detached(body):
    net, x = Body(body).train(), torch.randn(4, 6)
    stn = fxstn.transform(net, SCALAR, example_inputs=x).train()
    for module in (net, stn):
        module(x).sum().backward()
    assert stn.model.a.weight.grad is None
    torch.testing.assert_close(stn.model.b.weight.grad, net.b.weight.grad)


def in_autocast(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return s.a(x)


def assigns(s, x):
    s.last = s.a(x)
    return s.last


def replaces(s, x):
    s.mean = s.mean * 0.9
    return s.a(x) + s.mean


def reassigns(s, x):
    s.constant = s.a(x).mean()
    return s.a(x) + s.constant


def remembers(s, x):
    s.__dict__.setdefault("seen", []).append(1)
    return s.a(x)


REFUSED = {
    "data": (lambda s, x: s.a(x) if x.sum() > 0 else x, "torch.export cannot follow the forward"),
    "batch parity": (lambda s, x: s.a(x) if x.shape[0] % 2 == 0 else x, "something else for a batch of 3"),
    "batch limit": (lambda s, x: s.a(x) if x.shape[0] < 40 else x, "something else for a batch of 63"),
    "batch fixed": (lambda s, x: torch.stack([s.a(row) for row in x]), "something else for a batch of 2"),
    "custom function": (lambda s, x: Double.apply(s.a(x)), "custom autograd function Double"),
    "autocast": (in_autocast, "an autocast region"),
    "python's random": (lambda s, x: s.a(x) * random.random(), "a random draw in Python"),
    "numpy's random": (lambda s, x: s.a(x) * float(numpy.random.rand()), "a random draw in Python"),
    "assignment": (assigns, "the forward assigns 'last'"),
    "buffer assignment": (replaces, "the forward assigns 'mean'"),
    "tensor assignment": (reassigns, "the forward assigns 'constant'"),
    "memory": (remembers, "the forward assigns 'seen'"),
    "buffer update": (lambda s, x: s.a(x) * s.mean.mul_(0.9), "changes 'mean', of the model itself"),
    "set": (lambda s, x: {"parts": [{s.a(x)}]}, r"inside a set, at output\.parts\.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_would_lose_is_refused(name):
    body, message = REFUSED[name]
    net = Body(body)
    with pytest.raises(fxstn.TransformError, match=message) as caught:
        fxstn.transform(net, SCALAR, example_inputs=torch.randn(4, 6), trace="export")
    assert len(caught.value.problems) == 1
    assert set(vars(net)) == set(vars(Body(body)))


def test_an_export_that_fails_leaves_no_hook_behind_by_which_a_buffer_could_not_be_assigned(monkeypatch):
    def fails(*arguments, **options):
        nn.modules.module.register_module_buffer_registration_hook(lambda *_: pytest.fail("a hook of the export"))
        raise RuntimeError("cannot")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(fxstn.TransformError, match="cannot"):
        fxstn.transform(nn.Linear(6, 3), SCALAR, example_inputs=torch.randn(4, 6), trace="export")
    assert nn.BatchNorm1d(3).running_mean is not None


def test_hooks_are_refused():
    net = MODELS["dropped"]()
    net.stem[0].register_forward_hook(lambda *_: None)
    with pytest.raises(fxstn.TransformError, match=r"a hook.*in module 'stem\.0'"):
        fxstn.transform(net, SCALAR, example_inputs=torch.randn(4, 6), trace="export")


def test_the_problems_of_every_frontend_are_listed_with_module_and_source():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Body(lambda s, x: s.a(x) if x.sum() > 1e9 else s.b(s.a(x)))

        def forward(self, x):
            return self.inner(x)

    problems = fxstn.transform(Outer(), SCALAR, example_inputs=torch.randn(4, 6)).rejected
    assert [problem.frontend for problem in problems] == ["fx", "export"]
    assert [problem.what.split(" cannot")[0] for problem in problems] == ["symbolic tracing", "torch.export"]
    assert all(problem.where == "inner" and "test_export.py:" in problem.source for problem in problems)
    with pytest.raises(ValueError, match="trace='export' needs example_inputs"):
        fxstn.transform(Outer(), SCALAR, trace="export")


def test_frozen_batch_norms_stay_frozen():
    net = Body(normalised).train()
    net.norm.eval()
    stn = fxstn.transform(net, SCALAR, example_inputs=torch.randn(4, 6)).train()
    stn(torch.randn(4, 6))
    assert stn.model.norm.num_batches_tracked == 0
    assert not any(n.target is track_batch for n in stn.graph("train").graph.nodes)


@dataclass(init=False, eq=False, repr=False)
class Output(OrderedDict):
    """What transformers' models return: a dict that is a dataclass too, known to pytree."""


register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="fxstn_tests.Output",
)


class Returning(nn.Module):
    """Returns what `kind` makes of pairs (name, tensor), inside a tuple."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 6), nn.Linear(6, 3), kind

    def forward(self, x):
        h = self.a(x).tanh()
        return self.kind({"logits": self.b(h), "states": h, "sizes": x.argmax(1)}), h.sum(1)


@pytest.mark.parametrize("kind", [dict, OrderedDict, Output])
@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("method", ["delta", "stn"])
def test_outputs_keep_the_type_that_the_forward_returns(kind, trace, method):
    net, x = Returning(kind), torch.randn(4, 6)
    stn = fxstn.transform(net, [hp.Dropout("a", init=0.3)], example_inputs=x, trace=trace, method=method)
    for mode in (True, False):
        y, dy = stn.train(mode).pushforward(x, delta=torch.ones(1))
        outputs = (stn(x), y, dy, stn.perturbed_output(x, delta=torch.ones(1))[0], stn.conditioned_output(x)[0])
        assert [(type(output), type(output[0]), list(output[0])) for output in outputs] == [
            (tuple, kind, ["logits", "states", "sizes"])
        ] * 5
        assert dy[0]["sizes"] is None
    torch.testing.assert_close(dict(y[0]), dict(stn.model(x)[0]))


Named = namedtuple("Named", ["logits", "states", "sizes"])


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_named_tuples_stay_named_tuples(trace):
    net, x = Returning(lambda entries: Named(**entries)), torch.randn(4, 6)
    stn = fxstn.transform(net, SCALAR, example_inputs=x, trace=trace).train()
    for output in (stn(x), *stn.pushforward(x, delta=torch.ones(1))):
        assert type(output[0]) is Named


def test_the_model_is_left_as_it_was():
    net = MODELS["dropped"]().train()
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    by_both_modes(net)
    assert [module.training for module in net.modules()] == modes
    assert tree_map(torch.equal, dict(state), dict(net.state_dict())) == dict.fromkeys(state, True)


@pytest.mark.parametrize("dims", [1, ([2, 1], [0, 1])])
def test_a_tensordot_is_that_of_torch_where_aten_lists_the_dimensions_of_both(dims):
    class Contraction(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn((4, 2) if dims == 1 else (4, 3, 2)).double())

        def forward(self, x):
            return torch.tensordot(x, self.weight, dims=dims)

    model, x = Contraction(), torch.randn(5, 3, 4).double()
    report = fxstn.verify(model, x, hparams=[hp.WeightDecay()], trace="export")
    assert report.ok, str(report)
    assert fxstn.transform(model, [hp.WeightDecay()], example_inputs=x, trace="export").coverage.share == 1
