"""The pass condition: random operations read their strengths from λ, and specs insert new ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.hp import OPERATIONS, Activity, Dropout, Operation
from fxstn.hp.binding import NOTHING_BOUND, Site
from fxstn.ir.graphs import add_placeholder, copied, function_of, output_of, placeholders
from fxstn.ir.node_info import annotate, copy_place, info_of
from fxstn.ir.staging import staging_of
from fxstn.ir.tangents import BATCH_FIRST, SHARED, BatchAxes, BatchAxis
from fxstn.ir.vocabulary import ALPHA, DROPOUTS, SPATIAL
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask, keep_rates, one_for_all_examples, weight_mask
from fxstn.ops.response import for_all_examples
from fxstn.passes.places import own_strengths


def condition(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Random operations as an explicit draw and what is done with it, with strengths from `hparams(condition)` where tuned.

    Adds the input `condition`: None, (h,) or (batch, h), unconstrained units. An evaluation graph tunes nothing. The graph of
    a training objective returns (output, values) where the binding has auxiliary sites. A value is what the site draws, or
    (strength, activation).
    """
    binding = plan.binding if plan.kind.training else NOTHING_BOUND
    module = copied(module)
    graph = module.graph
    by_name = {node.name: node for node in graph.nodes}
    reader = _StrengthReader(graph, plan.batch_axes)
    own_sites = {site.node: site for site in binding.sites if not site.insert}
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in DROPOUTS or node.target in OPERATIONS):
            site = own_sites.get(node.name)
            _split(reader, node, *(reader.of_site(site, node) if site else (own_strengths(node), BATCH_FIRST)))
    inserted = [site for site in binding.sites if site.insert and not isinstance(site.spec, Activity)]
    # Inserted in reverse, because the one inserted last acts first: specs act in the order in which they are listed.
    noise = {site: _insert(graph, by_name[site.node], site, reader) for site in reversed(inserted)}
    for name, index in binding.dropped:
        for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == f"model.{name}"]:
            _drop_weights(graph, node, reader.of_weight(index, name, node.next), name)
    if plan.kind.auxiliary and binding.auxiliary:
        output = output_of(graph)
        values = tuple(
            (*reader.of_site(site, output)[0], by_name[site.node]) if isinstance(site.spec, Activity) else noise[site]
            for site in binding.auxiliary
        )
        output.args = ((output.args[0], values),)
    graph.lint()
    return module


class _StrengthReader:
    """Emits the nodes that read λ. One call of `hparams`, behind the graph's inputs, serves them all.

    So does one call of `keep_rates` all dropouts.
    """

    def __init__(self, graph: fx.Graph, batch_axes: BatchAxes) -> None:
        self.graph, self.batch_axes = graph, batch_axes
        self.condition = add_placeholder(graph, "condition")
        self.last_input = placeholders(graph)[-1]
        self.hparams: fx.Node | None = None
        self.keep_rates: fx.Node | None = None

    def read(self, index: int, name: str, before: fx.Node) -> fx.Node:
        """λ[..., index], constrained."""
        if self.hparams is None:
            with self.graph.inserting_after(self.last_input):
                self.hparams = self.graph.create_node("call_module", "hparams", (self.condition,), name="strengths")
        arguments = (self.hparams, cast(Argument, (..., index)))  # fx takes an Ellipsis, its annotation does not
        with self.graph.inserting_before(before):
            return self.graph.create_node("call_function", operator.getitem, arguments, name=name.replace(".", "_"))

    def keep_rate(self, p: Argument) -> fx.Node | None:
        """1 − p of a rate λ[..., index], behind it; None for any other."""
        if not isinstance(p, fx.Node) or p.target is not operator.getitem or p.args[0] is not self.hparams:
            return None
        if self.keep_rates is None:
            with self.graph.inserting_after(self.hparams):
                self.keep_rates = self.graph.call_function(keep_rates, (self.hparams,))
        with self.graph.inserting_after(p):
            return self.graph.create_node("call_function", operator.getitem, (self.keep_rates, p.args[1]))

    def of_site(self, site: Site, before: fx.Node) -> tuple[tuple[fx.Node, ...], BatchAxis]:
        """(the strengths of a site, where the examples are in its value).

        Where all examples share the value, they share the draw and its strength. Where the examples are nowhere, or elsewhere
        than the operation needs them, a strength per example is refused.
        """
        axis, needed = self.batch_axes.get(site.node, BATCH_FIRST), site.spec.examples
        dropout = isinstance(site.spec, Dropout)
        strengths = []
        known = axis not in (None, SHARED) and (needed is None or axis == BatchAxis(needed))
        for index, number in zip(site.indices, site.spec.numbers, strict=True):
            strength = self.read(index, f"{site.path or 'output'}_{'p' if dropout else number}", before)
            where = f"{'dropout' if dropout else number} at '{site.path}'"
            if axis == SHARED and needed is None:
                strength = self._alike(strength, index, where, before)
            elif not known:
                with self.graph.inserting_before(before):
                    strength = self.graph.call_function(for_all_examples, (strength, 0, where))
            strengths.append(strength)
        return tuple(strengths), axis if axis is not None and known else BATCH_FIRST

    def of_weight(self, index: int, name: str, before: fx.Node) -> fx.Node:
        """The strength of an operation on a parameter, of which all examples see the same."""
        return self._alike(self.read(index, f"{name}_p", before), index, f"hp.DropConnect on '{name}'", before)

    def _alike(self, strength: fx.Node, index: int, where: str, before: fx.Node) -> fx.Node:
        """A strength that is the same for all examples."""
        with self.graph.inserting_before(before):
            return self.graph.call_function(one_for_all_examples, (strength, self.condition, index, where))


def _split(reader: _StrengthReader, node: fx.Node, strengths: Sequence[Argument], axis: BatchAxis) -> fx.Node:
    """Splits a random operation into its draw, which is returned, and what is done with it, at the node itself."""
    graph, x, operation = node.graph, node.args[0], OPERATIONS.get(function_of(node))
    if operation is None:
        return _split_dropout(reader, node, strengths[0], axis)
    if all(strength == 0 for strength in strengths):
        node.target, node.args, node.kwargs = torch.clone, (x,), {}
        annotate(node, handed_through=True)
        return node
    source = x.args if operation.follows and isinstance(x, fx.Node) else x
    settings = dict(node.kwargs)
    if operation.examples is None and axis != BATCH_FIRST:
        settings["batch_axis"] = axis
    with graph.inserting_before(node):
        noise = graph.create_node(
            "call_function", operation.draw, (source, *strengths), settings, name=f"{node.name}_draw"
        )
    copy_place(noise, node)
    node.target, node.args = operation.apply, (x, noise)
    node.kwargs = node.kwargs if staging_of(operation.apply) else {}  # functions of torch take no settings
    return noise


def _split_dropout(reader: _StrengthReader, node: fx.Node, p: Argument, axis: BatchAxis) -> fx.Node:
    graph, x, spatial = node.graph, node.args[0], SPATIAL.get(node.target, 0)
    draw = alpha_dropout_coefficients if node.target in ALPHA else dropout_mask
    arguments: tuple[Argument, ...] = (x, p, spatial) if spatial or axis != BATCH_FIRST else (x, p)
    arguments += (axis,) if axis != BATCH_FIRST else ()
    keep_rate = reader.keep_rate(p) if draw is dropout_mask else None
    settings: dict[str, Argument] = {} if keep_rate is None else {"keep_rate": keep_rate}
    with graph.inserting_before(node):
        noise = graph.create_node("call_function", draw, arguments, settings, name=f"{node.name}_mask")
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
    """Gives a parameter's value one mask for the whole batch. A copy of the node later in the graph gets another mask."""
    readers, label = list(weight.users), name.replace(".", "_")
    with graph.inserting_after(p):
        mask = graph.create_node("call_function", weight_mask, (weight, p), name=f"{label}_mask")
    with graph.inserting_after(mask):
        product = graph.create_node("call_function", operator.mul, (weight, mask), name=f"{label}_kept")
    for node in (p.all_input_nodes[0], p, mask, product):
        copy_place(node, weight)
    for reader in readers:
        reader.replace_input_with(weight, product)


def _insert(graph: fx.Graph, value: fx.Node, site: Site, reader: _StrengthReader) -> fx.Node:
    """Gives a value an operation of its own, for its readers outside of one module call. Returns the operation's draw."""
    readers = [
        user
        for user in value.users
        if site.outside is None or all(call.number != site.outside for call in info_of(user).scope)
    ]
    anchor = (reader.last_input if value.op == "placeholder" else value).next
    while anchor.op == "placeholder" or anchor.target in ("hparams", keep_rates):
        anchor = anchor.next
    function: Callable[..., object] = F.dropout
    arguments: tuple[Argument, ...] = (value, 0.0, True)
    settings: Mapping[str, Argument] = {}
    if isinstance(site.spec, Operation):
        function, settings = site.spec.function, cast(Mapping[str, Argument], site.spec.settings)
        arguments = (value, *[0.0] * len(site.spec.numbers))
    name = f"{site.path or 'output'}_{function.__name__}".replace(".", "_")
    with graph.inserting_before(anchor):
        result = graph.create_node("call_function", function, arguments, dict(settings), name)
    copy_place(result, value)
    annotate(result, scope=tuple(call for call in info_of(value).scope if call.number != site.outside))
    noise = _split(reader, result, *reader.of_site(site, result))
    for user in readers:
        user.replace_input_with(value, result)
    return noise
