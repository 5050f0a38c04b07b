"""Pass 3, condition: random operations read their strengths from λ, and new ones are inserted where the specs ask."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.hp import OPERATIONS, Activity, Dropout, Operation
from fxstn.hp.binding import NOTHING_BOUND, Site
from fxstn.ir.graphs import add_placeholder, copied, placeholders
from fxstn.ir.node_info import annotate, copy_place, info_of
from fxstn.ir.staging import staging_of
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ir.vocabulary import ALPHA, DROPOUTS, SPATIAL
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask, weight_mask
from fxstn.ops.response import for_all_examples
from fxstn.passes.match import own_strengths


def condition(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Random operations as an explicit draw and what is done with it, with strengths from `hparams(condition)` where tuned.

    Adds the input `condition`: None, (h,) or (batch, h), unconstrained units. An evaluation graph tunes nothing. The graph of a
    training objective returns (output, values) with a value for each of the binding's auxiliary sites, where there are any:
    what was drawn, or (strength, activation).
    """
    binding = plan.binding if plan.kind.training else NOTHING_BOUND
    module = copied(module)
    graph = module.graph
    sites = binding.sites
    by_name = {node.name: node for node in graph.nodes}
    placeholder = add_placeholder(graph, "condition")
    hparams: fx.Node | None = None
    last_input = placeholders(graph)[-1]

    def read(index: int, name: str, before: fx.Node) -> fx.Node:
        nonlocal hparams
        if hparams is None:
            with graph.inserting_after(last_input):
                hparams = graph.create_node("call_module", "hparams", (placeholder,), name="strengths")
        with graph.inserting_before(before):
            entry: Any = (..., index)
            return graph.create_node("call_function", operator.getitem, (hparams, entry), name=name.replace(".", "_"))

    def strengths(site: Site, before: fx.Node) -> tuple[tuple[Any, ...], BatchAxis]:
        place = plan.batch_axes.get(site.node, BATCH_FIRST)
        dropout = isinstance(site.spec, Dropout)
        expected = site.spec.examples
        known = place is not None and (expected is None or place == BatchAxis(expected))
        found = []
        for index, number in zip(site.indices, site.spec.numbers, strict=True):
            value = read(index, f"{site.path or 'output'}_{'p' if dropout else number}", before)
            with graph.inserting_before(before):
                what = f"{'dropout' if dropout else number} at '{site.path}'"
                found.append(value if known else graph.call_function(for_all_examples, (value, 0, what)))
        return tuple(found), (place or BATCH_FIRST) if known else BATCH_FIRST

    drawn: dict[Site, fx.Node] = {}
    taken = {site.node: site for site in sites if not site.insert}
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in DROPOUTS or node.target in OPERATIONS):
            site = taken.get(node.name)
            _draw(graph, node, *(strengths(site, node) if site else (own_strengths(node), BATCH_FIRST)))
    inserted = [site for site in sites if site.insert and not isinstance(site.spec, Activity)]
    for site in reversed(inserted):  # of two after one value the first asked for acts first
        drawn[site] = _insert(graph, by_name[site.node], site, strengths, last_input)
    for name, index in binding.dropped:
        for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == f"model.{name}"]:
            _drop_weights(graph, node, read(index, f"{name}_p", node.next), name)
    if plan.kind.auxiliary and binding.auxiliary:
        output = next(node for node in graph.nodes if node.op == "output")
        told = [
            (*strengths(site, output)[0], by_name[site.node]) if isinstance(site.spec, Activity) else drawn[site]
            for site in binding.auxiliary
        ]
        output.args = ((output.args[0], tuple(told)),)
    graph.lint()
    return module


def _draw(graph: fx.Graph, node: fx.Node, strengths: tuple, place: BatchAxis) -> fx.Node:
    """Replace a random operation by its draw, which is returned, and what is done with it, in place, name kept."""
    x, operation = node.args[0], OPERATIONS.get(node.target)  # type: ignore[arg-type]
    if operation is None:
        return _draw_dropout(graph, node, strengths[0], place)
    if all(strength == 0 for strength in strengths):
        node.target, node.args, node.kwargs = torch.clone, (x,), {}
        annotate(node, handed_through=True)
        return node
    with graph.inserting_before(node):
        arguments: tuple = (x.args if operation.follows else x, *strengths)  # type: ignore[union-attr]
        settings = dict(node.kwargs)
        if operation.examples is None and place != BATCH_FIRST:
            settings["place"] = place
        drawn = graph.create_node("call_function", operation.draw, arguments, settings, f"{node.name}_draw")
    copy_place(drawn, node)
    node.target, node.args = operation.apply, (x, drawn)
    node.kwargs = node.kwargs if staging_of(operation.apply) else {}  # torch's own take no settings
    return drawn


def _draw_dropout(graph: fx.Graph, node: fx.Node, p: fx.Node | float, place: BatchAxis) -> fx.Node:
    x, spatial = node.args[0], SPATIAL.get(node.target, 0)
    with graph.inserting_before(node):
        draw = alpha_dropout_coefficients if node.target in ALPHA else dropout_mask
        arguments: tuple = (x, p, spatial) if spatial or place != BATCH_FIRST else (x, p)
        arguments += (place,) if place != BATCH_FIRST else ()
        noise = graph.create_node("call_function", draw, arguments, name=f"{node.name}_mask")
        copy_place(noise, node)
        if node.target in ALPHA:
            multiplier = graph.call_function(operator.getitem, (noise, 0))
            shift = graph.call_function(operator.getitem, (noise, 1))
            product = graph.call_function(operator.mul, (x, multiplier))
            node.target, node.args, node.kwargs = operator.add, (product, shift), {}
        else:
            node.target, node.args, node.kwargs = operator.mul, (x, noise), {}
    return noise


def _drop_weights(graph: fx.Graph, weight: fx.Node, p: fx.Node, name: str) -> None:
    """Give a parameter's value one mask for the whole batch; a copy of the parameter's node later in the graph gets another."""
    readers = list(weight.users)
    with graph.inserting_after(p):
        mask = graph.create_node("call_function", weight_mask, (weight, p), name=f"{name}_mask".replace(".", "_"))
    with graph.inserting_after(mask):
        product = graph.create_node(
            "call_function", operator.mul, (weight, mask), name=f"{name}_kept".replace(".", "_")
        )
    for node in (p, mask, product):
        copy_place(node, weight)
    for reader in readers:
        reader.replace_input_with(weight, product)


def _insert(graph: fx.Graph, value: fx.Node, site: Site, strengths: Any, last_input: fx.Node) -> fx.Node:
    """Give a value an operation of its own, whose draw is returned, for its readers outside of one module call."""
    after = last_input if value.op == "placeholder" else value
    readers = [
        user
        for user in value.users
        if site.outside is None or all(call.number != site.outside for call in info_of(user).scope)
    ]
    scope = tuple(call for call in info_of(value).scope if call.number != site.outside)
    anchor = after.next
    while anchor.op == "placeholder" or anchor.target == "hparams":
        anchor = anchor.next
    spec = site.spec
    function: Any = F.dropout
    arguments: tuple[Any, ...] = (value, 0.0, True)
    settings: dict[str, Any] = {}
    if isinstance(spec, Operation):
        function, arguments, settings = spec.function, (value, *[0.0] * len(spec.numbers)), spec.settings
    with graph.inserting_before(anchor):
        name = f"{site.path or 'output'}_{function.__name__}".replace(".", "_")
        result = graph.create_node("call_function", function, arguments, settings, name)
    copy_place(result, value)
    annotate(result, scope=scope)
    drawn = _draw(graph, result, *strengths(site, result))
    for reader in readers:
        reader.replace_input_with(value, result)
    return drawn
