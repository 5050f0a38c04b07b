"""Law 6 for every pass in the folder: its input stays as it is; and what holds after it, on networks of all kinds."""

from __future__ import annotations

import ast
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxstn
from fxstn import hp
from fxstn.frontends.inputs import Inputs, InputSpec
from fxstn.frontends.interface import Plan
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.node_info import annotate, info_of
from fxstn.ir.output_types import OutputTypes
from fxstn.network import SelfTuningNetwork
from fxstn.ops.noise import track_batch, track_batches
from fxstn.ops.precision import lower
from fxstn.ops.scaled import scaled_tangent
from fxstn.ops.sums import scaled_product
from fxstn.passes import invariants
from fxstn.passes.canonicalize import canonicalize, drop_handed_through
from fxstn.passes.invariants import FACTS, check
from fxstn.passes.recompute import recompute as recompute_pass
from fxstn.transform import PIPELINES
from tests.nets import Classifier, SmallConv, mlp

FOLDER = Path(inspect.getfile(canonicalize)).parent


class Mutating(nn.Module):
    """In place, by methods, by operators, with a weight in parts and a functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight, self.out = nn.Embedding(9, 4), nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 2)
        self.layer = nn.Linear(4, 4)

    def forward(self, tokens):
        first, second = self.weight.chunk(2)
        y = self.layer(F.dropout(F.linear(self.table(tokens), first), 0.2, self.training))
        y[:, 0] = 0.0
        y.relu_()
        y += y.mean(-1, keepdim=True)
        return torch.log_softmax(self.out(F.linear(y, second)).mean(1), -1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 5, batch_first=True, num_layers=2, dropout=0.2), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Typed(nn.Module):
    """Returns a type that a graph gives back in its last pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x).tanh()
        return OrderedDict(logits=self.b(h), states=h)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list | None]] = {
    "dense": (mlp, torch.randn(4, 6), [hp.Dropout(), hp.DropConnect("0"), hp.WeightDecay(), hp.MixUp()]),
    "convolutions": (SmallConv, torch.randn(4, 3, 16, 16), [hp.Cutout(), hp.Dropout("stem")]),
    "functional": (Classifier, torch.randn(4, 1, 8, 8), None),
    "mutating": (Mutating, torch.randint(9, (4, 3)), [hp.Dropout("out"), hp.ActivationDecay("layer")]),
    "typed": (Typed, torch.randn(4, 4), [hp.Dropout("a"), hp.ActivationDecay("a")]),
    "recurrent": (Recurrent, torch.randn(4, 3, 4), None),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(4, 5, 8), None),
}


def transformed(name: str, frontend: str, structured: bool) -> tuple[SelfTuningNetwork, torch.Tensor]:
    torch.manual_seed(0)
    make, x, specs = NETWORKS[name]
    response = "structured" if structured else "scaled"
    return fxstn.transform(make(), specs, example_inputs=x, trace=frontend, response=response), x


def facts_of(module: fx.GraphModule) -> tuple[str, list, dict]:
    """All of a graph that a pass could change."""
    infos = [(node.name, info_of(node), node.meta.get("stack_trace")) for node in module.graph.nodes]
    return str(module.graph), infos, {name: value.clone() for name, value in module.state_dict().items()}


def unaltered(function: Callable[..., fx.GraphModule], module: fx.GraphModule, *rest: object) -> fx.GraphModule:
    """function(module, *rest), after a check that it leaves the module as it is."""
    text, infos, state = facts_of(module)
    result = function(module, *rest)
    assert facts_of(module)[:2] == (text, infos), function
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items()), function
    assert list(dict(result.named_parameters())) == list(dict(module.named_parameters())), function
    return result


@pytest.mark.parametrize(
    ("frontend", "structured"),
    [
        pytest.param("fx", False, id="fx-scaled"),
        pytest.param("fx", True, id="fx-structured"),
        pytest.param("export", False, id="export-scaled"),
        pytest.param("export", True, id="export-structured", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_leaves_its_input_as_it_is_and_makes_its_facts_hold(name, frontend, structured):
    stn, x = transformed(name, frontend, structured)
    stn.locate_examples(x)
    recipe = stn.recipe
    for objective, passes in PIPELINES.items():
        for training in (True, False) if objective not in ("general", "trained") else (True,):
            for statistics in ("batch", "running"):
                kind = GraphKind(objective, training)
                axes = recipe.locate(stn, training, Inputs((x,), {}))
                plan = replace(recipe.plan, kind=kind, batch_axes=axes, statistics=statistics, recompute=True)
                graph, done = stn.canonical(training), [canonicalize]
                check(graph, done)
                for apply in passes:
                    graph = unaltered(apply, graph, plan)
                    done.append(apply)
                    check(graph, done)


@pytest.mark.parametrize("name", NETWORKS)
def test_canonicalize_leaves_what_a_frontend_captures_as_it_is(name):
    stn, x = transformed(name, "fx", False)
    for training in (True, False):
        frontend = type(stn.recipe.frontend)(InputSpec.of(stn.model, Inputs((x,), {})))
        graph = unaltered(canonicalize, frontend.capture(stn.model, training, stn.recipe.plan.frozen, Inputs((x,), {})))
        check(graph, [canonicalize])
        unaltered(drop_handed_through, graph)


def passes_in_the_folder() -> set[str]:
    """Public functions from a graph, and perhaps a plan, to a graph."""
    names = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation]
                result = ast.unparse(node.returns) if node.returns else ""
                if result == "fx.GraphModule" and arguments in (["fx.GraphModule"], ["fx.GraphModule", "Plan"]):
                    names.add(node.name)
    return names


def test_every_pass_in_the_folder_is_run_above():
    run = {canonicalize, drop_handed_through, *(apply for passes in PIPELINES.values() for apply in passes)}
    assert passes_in_the_folder() == {apply.__name__ for apply in run}
    assert set(FACTS) == run - {drop_handed_through}


# What stands in the way of each fact, planted in a graph that passes


def planted(stn: SelfTuningNetwork, objective: str, recompute: bool = True) -> tuple[fx.GraphModule, list]:
    plan = Plan(GraphKind(objective, True), stn.recipe.plan.binding, recompute=recompute)
    graph, done = stn.canonical(True), [canonicalize]
    for apply in [one for one in PIPELINES[objective] if recompute or one is not recompute_pass]:
        graph = apply(graph, plan)
        done.append(apply)
    return graph, done


def first(graph: fx.GraphModule, op: str) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.op == op)


def calls_a_method(graph):
    last = list(graph.graph.nodes)[-2]
    with graph.graph.inserting_after(last):
        last.replace_all_uses_with(made := graph.graph.call_method("clone", (last,)))
    made.args = (last,)


def has_another_spelling(graph):
    node = first(graph, "call_function")
    with graph.graph.inserting_after(node):
        node.replace_all_uses_with(made := graph.graph.call_function(torch.absolute, (node,)))
    made.args = (node,)


def writes(graph):
    annotate(first(graph, "call_function"), mutates=0)


def draws_inside(graph):
    node = first(graph, "call_function")
    with graph.graph.inserting_after(node):
        node.replace_all_uses_with(made := graph.graph.call_function(F.dropout, (node, 0.5, True)))
    made.args = (node, 0.5, True)


def forgets_its_response(graph):
    annotate(next(node for node in graph.graph.nodes if info_of(node).response), response=None)


def counts_a_batch(graph):
    x = first(graph, "placeholder")
    with graph.graph.inserting_before(list(graph.graph.nodes)[-1]):
        mean = graph.graph.get_attr("model.bn1.running_mean")
        graph.graph.call_function(F.batch_norm, (x, mean, mean, None, None, True, 0.1, 1e-5))


def forgets_its_operation(graph):
    annotate(next(node for node in graph.graph.nodes if info_of(node).rule), operation=None)


def returns_the_leaves_alone(graph):
    output = graph.graph.output_node()
    annotate(output, types=OutputTypes.of(OrderedDict(y=0), int))
    output.args = ([output.args[0]],)


def computes_for_nobody(graph):
    last = list(graph.graph.nodes)[-2]
    with graph.graph.inserting_after(last):
        graph.graph.call_function(torch.exp, (last,))


def counts_again(graph):
    counter = graph.graph.find_nodes(op="call_function", target=track_batches)[0].args[0][0]
    with graph.graph.inserting_after(counter):
        graph.graph.call_function(track_batch, (counter, 0.1))
        other = graph.graph.get_attr("model.bn1.running_mean")
    with graph.graph.inserting_after(other):
        graph.graph.call_function(track_batch, (other, 0.1))


def forgets_a_constant(graph):
    layer = graph.graph.find_nodes(op="call_function", target=scaled_tangent)[0]
    layer.update_kwarg("ends", None)


def reads_a_wide_weight(graph):
    wide = graph.graph.find_nodes(op="call_function", target=lower)[0].all_input_nodes[0]
    product = graph.graph.find_nodes(op="call_function", target=torch.conv2d)[0]
    product.update_arg(1, wide)


def keeps_an_activation(graph):
    node = first(graph, "placeholder")
    with graph.graph.inserting_before(list(graph.graph.nodes)[-1]):
        made = graph.graph.call_function(torch.exp, (node,))
    output = list(graph.graph.nodes)[-1]
    output.args = ((output.args[0], made),)


def forgets_a_region(graph):
    computes_for_nobody(graph)
    annotate(graph.graph.find_nodes(op="call_function", target=torch.exp)[0], full_precision=("cpu",))


def multiplies_first(graph):
    node = next(iter(graph.graph.find_nodes(op="call_function", target=scaled_product)))
    with graph.graph.inserting_before(node):
        product = graph.graph.call_function(torch.nn.functional.linear, node.args[:2])
    node.target, node.args = scaled_tangent, (product, *node.args[2:])


UNPIECED = ("shifts_are_joined", "weights_are_lowered_once", "terms_are_joined")  # before nodes are moved into pieces
PLANTED = {
    "only_functions_are_called": (calls_a_method, "plain", "calls the method clone"),
    "spellings_are_canonical": (has_another_spelling, "plain", "in place of"),
    "nothing_is_written": (writes, "plain", "writes into its argument 0"),
    "draws_are_explicit": (draws_inside, "plain", "draws inside"),
    "parameters_know_their_response": (forgets_its_response, "pushforward", "names the response None"),
    "statistics_are_held": (counts_a_batch, "pushforward", "updates running statistics"),
    "tangents_name_their_rule": (forgets_its_operation, "pushforward", "and the operation None"),
    "outputs_have_their_types": (returns_the_leaves_alone, "plain", "a plain list is returned"),
    "everything_is_read": (computes_for_nobody, "plain", "nobody reads exp"),
    "batches_are_counted_at_once": (counts_again, "plain", "count one by one"),
    "shifts_are_joined": (forgets_a_constant, "linearized", "makes constants of its own"),
    "weights_are_lowered_once": (reads_a_wide_weight, "linearized", "in the type that it is kept in"),
    "terms_are_joined": (multiplies_first, "linearized", "adds a product that nobody else reads"),
    "regions_keep_their_precision": (forgets_a_region, "plain", "has the precision of what is around its region"),
    "pieces_are_recomputed": (keeps_an_activation, "linearized", "is kept outside of the pieces"),
}


@pytest.mark.parametrize("fact", PLANTED)
def test_a_fact_that_does_not_hold_is_found(fact):
    stn, _ = transformed("convolutions", "fx", False)
    break_it, objective, message = PLANTED[fact]
    graph, done = planted(stn, objective, recompute=fact not in UNPIECED)
    check(graph, done)
    break_it(graph)
    with pytest.raises(ValueError, match=message):
        check(graph, done)


def test_every_fact_is_planted_above():
    assert {fact.__name__ for facts in FACTS.values() for fact in facts} == set(PLANTED) <= set(dir(invariants))
