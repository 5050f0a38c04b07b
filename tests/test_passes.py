"""What each pass does to a graph: before and after."""

from __future__ import annotations

import operator
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision import models

import fxstn
from fxstn import hp
from fxstn.frontends.symbolic import Symbolic
from fxstn.ir.graphs import assemble
from fxstn.ops.noise import dropout_mask, weight_mask
from fxstn.ops.response import responses_in
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.simplify import simplify
from tests.nets import Classifier, SmallConv, mlp


def test_parameter_names_and_node_names_survive_the_passes():
    net = SmallConv()
    stn = fxstn.transform(net)
    assert list(dict(stn.model.named_parameters())) == list(dict(net.named_parameters()))
    read = {n.target.removeprefix("model.") for n in stn.graph("pushforward").graph.nodes if n.op == "get_attr"}
    assert set(dict(net.named_parameters())) <= read
    train = {n.name for n in stn.graph("train").graph.nodes if n.op == "call_function" and "_batch" not in n.name}
    assert train <= {n.name for n in stn.graph("pushforward").graph.nodes}


def test_the_emitted_code_reads_like_the_network():
    code = fxstn.transform(models.resnet18()).graph("pushforward").code
    for line in (
        'layer1_0_conv1_weight = getattr(self.model.layer1, "0").conv1.weight',
        "layer1_0_conv1 = torch.conv2d(maxpool_dropout, layer1_0_conv1_weight, None,",
        "d_layer1_0_relu = torch.ops.aten.threshold_backward(d_layer1_0_bn1, layer1_0_relu, 0)",
        "return (fc, d_fc)",
    ):
        assert line in code, line


def test_the_docs_show_emitted_code():
    page = (Path(__file__).parents[1] / "docs/concepts/compiler.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\w+ = (?:torch\.conv2d|add_scaled)\(.*$", page, re.MULTILINE)
    code = fxstn.transform(models.resnet18(), response="structured").graph("pushforward").code
    code = code.replace("fxstn_ops_response_", "")
    assert len(lines) == 4
    assert [line for line in lines if line.removesuffix("...)") not in code] == []


class Spellings(nn.Module):
    """One computation, spelled with methods, operators, keywords, in place, or plainly."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.weight, self.plain = nn.Parameter(torch.randn(4, 4)), plain

    def forward(self, x):
        if self.plain:
            y = F.linear(x, self.weight)
            y = F.relu(y) + 2 * x
            y = (y - 0.5) / 2
            y = torch.clamp(y, -1, 1)
            y = torch.cat([y, torch.sigmoid(y)], 1)
            return torch.mean(torch.flatten(torch.reshape(y, (-1, 2, 4)), 1), 1, keepdim=True)
        y = F.linear(input=x, weight=self.weight)
        y = y.relu_()
        y += torch.mul(x, 2)
        y.sub_(0.5)
        y = y.div(2)
        y = y.clip(min=-1, max=1)
        y = torch.cat(tensors=(y, y.sigmoid()), dim=1)
        return y.reshape(x.size(0), 2, 4).flatten(start_dim=1).mean(dim=1, keepdim=True)


def test_spellings_of_one_computation_become_one_graph():
    plain, other = Spellings(True), Spellings(False)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4)
    graphs = [simplify(canonicalize(Symbolic().capture(net, True))) for net in (plain, other)]
    assert torch.equal(graphs[0](x), graphs[1](x))
    assert torch.equal(graphs[1](x), other(x))
    functions = [[n.target for n in g.graph.nodes if n.op == "call_function"] for g in graphs]
    assert set(functions[1]) - {torch.Tensor.size} == set(functions[0])
    assert all(n.op != "call_method" for g in graphs for n in g.graph.nodes)
    assert fxstn.verify(other, torch.randn(3, 4), hparams=[hp.Scalar("a", 0.5, 0, 1)]).ok


class Aliased(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.fc, self.body = nn.Linear(4, 4), body

    def forward(self, x):
        return self.body(self.fc(x))


def mutated_then_read(y):
    z = y.relu_()
    return y + z


def shared_iadd(y):
    z = y
    y += 1
    return z * y


def view_then_read(y):
    v = y.view(-1)
    v.relu_()
    return y * 2


def chunk_then_read(y):
    a, _ = y.chunk(2, 1)
    a.mul_(3)
    return y


def assigned_then_read(y):
    y[:, 0] = 2.0
    y[1] = y[:, 0].sum()
    return y


def assigned_by_mask(y):
    y[y > 0] = 0.5
    return y * 2


def part_changed_in_place(y):
    y[:, 1:][:, 0].mul_(y[:, 3]).add_(1)
    y[:, :2] += y[:, 2:]
    return y + 1


def product_changed_in_place(y):
    product = torch.einsum("ij,kj->ik", y, y)
    product += 1
    return product @ y


@pytest.mark.parametrize(
    "body",
    [
        product_changed_in_place,
        mutated_then_read,
        shared_iadd,
        assigned_then_read,
        assigned_by_mask,
        part_changed_in_place,
    ],
)
def test_a_mutation_is_seen_by_later_readers(body):
    net, x = Aliased(body), torch.randn(3, 4)
    assert torch.equal(simplify(canonicalize(Symbolic().capture(net, True)))(x), net(x))


def part_between_two_changes(y):
    part = y[:, 0].mul_(2)
    other = y[:, :2]
    part.add_(1)
    return other + y[:, 2:]


def another_part_then_read(y):
    part = y[:, :2]
    y[:, 1] = 0.0
    return part + y[:, 2:]


def transposed_by_einsum(y):
    turned = torch.einsum("ij->ji", y)
    y += 1
    return turned.mT


def moved_to_its_own_device(y):
    same = y.cpu()
    y += 1
    return same


def summed_to_its_own_size(y):
    same = y.sum_to_size(3, 4)
    y += 1
    return same


def broadcast_beside_another(y):
    _, same = torch.broadcast_tensors(torch.ones(4), y)
    y += 1
    return same


@pytest.mark.parametrize(
    "body",
    [
        view_then_read,
        chunk_then_read,
        another_part_then_read,
        part_between_two_changes,
        transposed_by_einsum,
        moved_to_its_own_device,
        summed_to_its_own_size,
        broadcast_beside_another,
    ],
)
def test_a_mutation_through_shared_memory_is_refused(body):
    with pytest.raises(fxstn.TransformError, match="in place on a tensor whose memory"):
        canonicalize(Symbolic().capture(Aliased(body), True))


def graph_of(function) -> fx.GraphModule:
    root = nn.Module()
    root.model = nn.Module()
    return assemble(root, fx.symbolic_trace(function).graph)


def twice(x):
    return torch.exp(x) + torch.exp(x)


def dead(x):
    torch.exp(x)
    return x + 1


def two_draws(x):
    return torch.rand_like(x) + torch.rand_like(x)


@pytest.mark.parametrize(("function", "left"), [(twice, 2), (dead, 1), (two_draws, 3)])
def test_simplify_merges_and_drops_but_never_merges_draws(function, left):
    simplified = simplify(graph_of(function))
    assert sum(n.op == "call_function" for n in simplified.graph.nodes) == left


def test_simplify_never_merges_dropout_masks():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))
    graph = fx.Graph()
    x = graph.placeholder("x")
    masks = [graph.call_function(dropout_mask, (x, 0.5)) for _ in range(2)]
    graph.output(graph.call_function(operator.add, tuple(masks)))
    root = nn.Module()
    root.model = net
    assert sum(n.target is dropout_mask for n in simplify(assemble(root, graph)).graph.nodes) == 2


def inserted_after(stn) -> dict[str, str]:
    """site → operation that its dropout follows, in the training graph."""
    nodes = {n.name: n for n in stn.graph("train").graph.nodes}
    return {
        name: nodes[name.replace(".dropout", "_dropout").replace(".", "_")].args[0].name for name in stn.hparams.names
    }


def test_without_dropout_stages_get_one_each_and_never_inside_a_group():
    stn = fxstn.transform(models.resnet18())
    assert inserted_after(stn) == {
        "input.dropout": "x",
        "maxpool.dropout": "maxpool",
        "layer1.dropout": "layer1_1_relu_1",
        "layer2.dropout": "layer2_1_relu_1",
        "layer3.dropout": "layer3_1_relu_1",
        "avgpool.dropout": "flatten",
    }
    assert list(fxstn.transform(nn.Sequential(models.resnet18())).hparams.values()) == [
        "input.dropout", "0.maxpool.dropout", "0.layer1.dropout", "0.layer2.dropout", "0.layer3.dropout", "0.avgpool.dropout"
    ]  # fmt: skip
    features = fxstn.transform(models.DenseNet(8, (2, 2, 2), 16)).graph("train").graph
    dropped = [n.args[0].target for n in features.nodes if n.target is dropout_mask]
    assert F.batch_norm not in dropped


def test_dropout_modules_start_at_their_own_strength_just_inside_the_range():
    net = mlp()
    net[2].p, net[5].p = 0.001, 0.4
    values = fxstn.transform(net).hparams.values()
    assert values == pytest.approx({"2.dropout": 0.0095, "5.dropout": 0.4}, rel=1e-5)
    assert list(fxstn.transform(Classifier()).hparams.values()) == ["dropout"]


@pytest.mark.parametrize("frontend", ["fx", "export", "live"])
def test_no_dropout_is_inserted_where_tokens_come_in(frontend):
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    tokens = torch.randint(9, (5, 3))
    assert fxstn.transform(net, example_inputs=tokens, trace=frontend).hparams.names == ("1.dropout", "3.dropout")
    with pytest.raises(ValueError, match="no input holds floating point numbers"):  # it would do nothing
        fxstn.transform(net, [hp.Dropout("input")], example_inputs=tokens, trace=frontend)


class Masked(nn.Module):
    """Tokens are reshaped before they are looked up, and padding is masked."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        embedded = self.table(tokens.unsqueeze(1)).squeeze(1) * (tokens != 0).unsqueeze(-1)
        return self.head(embedded.sum(1))


class Quantised(nn.Module):
    """What is looked up is computed from an input that can be dropped."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(13, 2)

    def forward(self, x):
        return self.head(torch.cat([x, self.table(x.argmax(1))], 1))


@pytest.mark.parametrize("frontend", ["fx", "export", "live"])
def test_tokens_are_told_by_the_lookup_that_reads_them(frontend):
    tokens = torch.randint(9, (5, 3))
    assert fxstn.transform(Masked(), example_inputs=tokens, trace=frontend).hparams.names == ("table.dropout",)
    bag = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2))
    found = fxstn.transform(bag, example_inputs=tokens, trace=frontend)
    assert found.hparams.names == ("0.dropout",)
    assert found.response.get_submodule("0.weight").U.shape[0] == 4  # a scale for each column
    names = fxstn.transform(Quantised(), example_inputs=torch.randn(5, 9), trace=frontend).hparams.names
    assert names == ("input.dropout", "table.dropout")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_embeddings_is_followed_through_export(mode):
    """The largest entry of a bag is not linear in the table, which then has no response."""
    net, tokens = (
        nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode, padding_idx=0), nn.Linear(4, 2)),
        torch.randint(9, (5, 3)),
    )
    assert fxstn.verify(net, tokens, trace="export").ok
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        responses = responses_in(fxstn.transform(net, example_inputs=tokens, trace="export").response)
    assert ["read by torch.embedding_bag in '0'" in str(one.message) for one in told] == [True] * (mode == "max")
    assert ("0.weight" in responses) == (mode != "max")


def test_outermost_matches_get_a_dropout_and_existing_ones_are_taken_over():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Dropout(0.3), nn.Linear(4, 2))
    assert fxstn.transform(net, [hp.Dropout("0*")]).hparams.names == ("0.dropout",)
    assert fxstn.transform(net, [hp.Dropout("?", "input")]).hparams.names == (
        "input.dropout", "0.dropout", "1.dropout", "2.dropout"
    )  # fmt: skip
    stn = fxstn.transform(net, [hp.Dropout("?", shared=True), hp.WeightDecay(shared=True)])
    assert stn.hparams.names == ("dropout", "weight_decay")
    assert sum(n.target is dropout_mask for n in stn.graph("train").graph.nodes) == 3


def test_dropout_after_a_module_acts_outside_of_it_on_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.block(x)
            return self.out(self.block(torch.tanh(y)) + y)

    stn = fxstn.transform(Twice(), [hp.Dropout("block")])
    nodes = list(stn.graph("train").graph.nodes)
    assert sum(n.target is dropout_mask for n in nodes) == 2
    readers = [n for n in nodes if n.target in (torch.tanh, operator.add)]
    assert readers
    assert all("dropout" in source.name for n in readers for source in n.all_input_nodes)


def test_an_identity_handed_through_is_dropped_only_for_its_own_readers():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.mark, self.fc = nn.Identity(), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.mark(x)) + x

    stn = fxstn.transform(Skip(), [hp.Dropout("mark", init=0.9)]).train()
    x = torch.ones(50, 4)
    with torch.no_grad():
        stn.model.fc.weight.zero_()
        stn.model.fc.bias.zero_()
    assert torch.equal(stn(x), x)


def test_one_mask_of_a_weight_takes_one_rate():
    """DropConnect at a rate per example is refused; one rate in all rows is that rate."""
    stn, x = fxstn.transform(mlp(), [hp.DropConnect("0", init=0.4), hp.Dropout("3")]).train(), torch.randn(5, 6)
    delta, condition = torch.zeros(2), torch.tensor([0.3, 0.0])
    torch.manual_seed(0)
    shared, _ = stn.pushforward(x, delta=delta, condition=condition)
    torch.manual_seed(0)
    rows = condition.repeat(5, 1)
    assert torch.equal(stn.pushforward(x, delta=delta, condition=rows)[0], shared)
    stn.pushforward(x, delta=delta, condition=rows + torch.tensor([0.0, 1.0]) * torch.arange(5.0)[:, None])
    rows[3, 0] = 0.5
    with pytest.raises(RuntimeError, match=r"hp.DropConnect on '0.weight' has one strength for all examples"):
        stn.pushforward(x, delta=delta, condition=rows)
    with pytest.raises(ValueError, match="5 rates for one mask; give one rate"):
        weight_mask(torch.ones(3, 3), torch.full((5,), 0.4))


@pytest.mark.parametrize(
    "body",
    [
        lambda y: y.kthvalue(2, 1).values + y.mode(1).values + y.max(1).values,
        lambda y: y.sort(1, descending=True).values * y.topk(4, 1).indices,
        lambda y: y.aminmax(dim=1).min + y.aminmax(dim=1).max + y.cummax(1).indices[:, 2],
        lambda y: torch.linalg.slogdet(y.transpose(0, 1) @ y + torch.eye(4)).logabsdet + y.sum(),
    ],
)
def test_named_results_are_read_by_number(body):
    net, x = Aliased(body), torch.randn(3, 4)
    graph = canonicalize(Symbolic().capture(net, True))
    assert not any(node.target is getattr for node in graph.graph.nodes)
    assert torch.equal(simplify(graph)(x), net(x))


def twice_through_one_weight(a, c, weight, bias):
    return F.linear(a, weight, bias) + (F.linear(c, weight) + c.sum())


def twice_through_two_weights(a, c, weight, bias):
    return F.linear(a, weight, bias) + (F.linear(c, weight.mT) + c.sum())


@pytest.mark.parametrize(("before", "after"), [(twice_through_one_weight, 1), (twice_through_two_weights, 2)])
def test_two_products_with_one_weight_become_one(before, after):
    simplified = simplify(graph_of(before))
    assert sum(node.target is F.linear for node in simplified.graph.nodes) == after
    inputs = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    torch.testing.assert_close(simplified(*inputs), before(*inputs))


class PooledTwice(nn.Module):
    """One pool behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.pool, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.MaxPool2d(2),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.head(self.pool(self.second(self.pool(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("frontend", ["fx", "export", "live"])
def test_stages_that_end_in_one_module_get_a_dropout_each(frontend):
    stn = fxstn.transform(PooledTwice(), example_inputs=torch.randn(2, 3, 16, 16), trace=frontend)
    assert [(site.path, site.node) for site in stn.recipe.plan.binding.sites] == [
        ("input", "x"),
        ("first", "pool"),
        ("second", "mean"),
    ]
    assert stn.hparams.names == ("input.dropout", "first.dropout", "second.dropout")
