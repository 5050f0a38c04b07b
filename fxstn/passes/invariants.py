"""Facts that hold in a graph after each pass. Tests check them between the passes; nothing else runs this file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import fx

from fxstn.frontends.interface import Pass
from fxstn.hp import OPERATIONS
from fxstn.ir.graphs import placeholders
from fxstn.ir.node_info import info_of
from fxstn.ir.spelling import respell
from fxstn.ir.vocabulary import DROPOUTS, dropout_settings, is_size
from fxstn.ops.noise import track_batch
from fxstn.ops.precision import in_full_precision, lower
from fxstn.ops.scaled import scaled_tangent, zero_and_one
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.condition import condition
from fxstn.passes.counters import join_counters
from fxstn.passes.effects import has_effect, updates_statistics
from fxstn.passes.hyperize import hyperize, response_tree
from fxstn.passes.join_shifts import join_shifts, joinable
from fxstn.passes.join_terms import join_terms, joinable_terms
from fxstn.passes.keep_precision import is_wide, keep_precision
from fxstn.passes.linearized import linearized
from fxstn.passes.lower_weights import PRODUCTS, lower_weights
from fxstn.passes.output_types import restore_types
from fxstn.passes.pushforward import perturbed, pushforward
from fxstn.passes.recompute import CHEAP, Recomputed, recompute
from fxstn.passes.simplify import simplify
from fxstn.passes.statistics import choose_statistics, hold_statistics

Fact = Callable[[fx.GraphModule], Iterator[str]]  # yields what does not hold


def check(module: fx.GraphModule, passes: Sequence[Pass | Callable[[fx.GraphModule], fx.GraphModule]]) -> None:
    """Checks every fact that the passes have established so far.

    passes: those that have made the graph, in their order.

    Raises ValueError that lists all that does not hold.
    """
    module.graph.lint()
    facts: dict[Fact, None] = {}
    for done in passes:
        facts = {fact: None for fact in facts if fact not in ENDS.get(done, ())} | dict.fromkeys(FACTS[done])
    problems = [problem for fact in facts for problem in fact(module)]
    if problems:
        name = getattr(passes[-1], "__name__", "the last pass")
        raise ValueError(f"{len(problems)} facts do not hold after {name}:\n" + "\n".join(f"  - {p}" for p in problems))


def only_functions_are_called(module: fx.GraphModule) -> Iterator[str]:
    """No method and no module of the model is called; the graph reads λ, responses and recomputed pieces by modules."""
    for node in module.graph.nodes:
        if node.op == "call_method":
            yield f"{node.name} calls the method {node.target}"
        elif node.op == "call_module" and str(node.target).partition(".")[0] == "model":
            yield f"{node.name} calls the module '{node.target}'"


def spellings_are_canonical(module: fx.GraphModule) -> Iterator[str]:
    """An operation has one spelling; dropout that does nothing is gone."""
    for node in module.graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        if (function := respell(node.target, node.args, node.kwargs).function) is not node.target:
            yield f"{node.name} calls {node.target} in place of {function}"
        if node.target in DROPOUTS and not dropout_settings(node)[1]:
            yield f"{node.name} is dropout in eval mode"


def nothing_is_written(module: fx.GraphModule) -> Iterator[str]:
    """Mutations are expressed by values."""
    for node in module.graph.nodes:
        if info_of(node).mutates is not None:
            yield f"{node.name} writes into its argument {info_of(node).mutates}"
        elif node.op == "call_function" and not is_size(node) and respell(node.target, node.args, node.kwargs).in_place:
            yield f"{node.name} works in place"


def draws_are_explicit(module: fx.GraphModule) -> Iterator[str]:
    """A random operation of the vocabulary is a draw, and what is done with it. The strengths come from one place."""
    for node in module.graph.nodes:
        if node.op == "call_function" and (node.target in DROPOUTS or node.target in OPERATIONS):
            yield f"{node.name} draws inside"
    if "condition" not in [node.name for node in placeholders(module.graph)]:
        yield "the graph has no input 'condition'"
    if len([node for node in module.graph.nodes if node.target == "hparams"]) > 1:
        yield "the strengths are computed more than once"


def parameters_know_their_response(module: fx.GraphModule) -> Iterator[str]:
    """A parameter that responds names its response R; what is computed from it row by row names its scales."""
    nodes = {node.name: node for node in module.graph.nodes}
    responding = {f"model.{name}" for name, _ in response_tree(module)}
    if "delta" not in [node.name for node in placeholders(module.graph)]:
        yield "the graph has no input 'delta'"
    for node in module.graph.nodes:
        info = info_of(node)
        if (node.op == "get_attr" and node.target in responding) != (info.response is not None):
            yield f"{node.name} names the response {info.response}"
        elif info.response and (info.response not in nodes or nodes[info.response].op != "get_attr"):
            yield f"{node.name} names the response {info.response}, which is no parameter"
        elif info.response and not info.scales:
            yield f"{node.name} responds and names no scales"
        for name in (scales.name for scales in info.scales):
            if name not in nodes or not _are_scales(nodes[name]):
                yield f"{node.name} names the scales {name}, which no response computes"
            elif not nodes[name] < node:
                yield f"{node.name} comes before its scales {name}"


def _are_scales(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and (source.op, source.target) == ("call_module", "response")


def statistics_are_held(module: fx.GraphModule) -> Iterator[str]:
    """No norm updates running statistics."""
    for node in module.graph.nodes:
        if updates_statistics(node):
            yield f"{node.name} updates running statistics"


def tangents_name_their_rule(module: fx.GraphModule) -> Iterator[str]:
    """A node that a tangent goes through knows the kind of its rule and the name of its operation."""
    ruled = [node for node in module.graph.nodes if info_of(node).rule is not None]
    if not ruled:
        yield "no tangent goes through any node"
    for node in module.graph.nodes:
        if (info_of(node).rule is None) != (info_of(node).operation is None):
            yield f"{node.name} has the rule {info_of(node).rule} and the operation {info_of(node).operation}"


def outputs_have_their_types(module: fx.GraphModule) -> Iterator[str]:
    """Where the forward returns a type of its own, the graph does not return a plain list of its leaves."""
    output = module.graph.output_node()

    def plain(value: object) -> bool:
        return isinstance(value, list) or (isinstance(value, tuple) and any(map(plain, value)))

    if (types := info_of(output).types) is not None and plain(output.args[0]):
        yield f"a plain list is returned in place of {types.name}"


def everything_is_read(module: fx.GraphModule) -> Iterator[str]:
    """No value is dead, and nothing only hands a value on."""
    for node in module.graph.nodes:
        if info_of(node).handed_through:
            yield f"{node.name} hands {node.args[0]} on"
        elif not node.users and not has_effect(node):
            yield f"nobody reads {node.name}"


def batches_are_counted_at_once(module: fx.GraphModule) -> Iterator[str]:
    """At most one operation counts a batch by itself for a norm whose average has a momentum."""
    counts = [
        node for node in module.graph.find_nodes(op="call_function", target=track_batch) if node.args[1] is not None
    ]
    counters = {str(node.args[0]) for node in counts}
    if len(counters) > 1:
        yield f"{', '.join(node.name for node in counts)} count one by one"


def shifts_are_joined(module: fx.GraphModule) -> Iterator[str]:
    """No bias that could have a part in the product of all scales has kernels of its own, nor has a layer its constants."""
    for node in module.graph.find_nodes(op="call_function", target=scaled_tangent):
        if node.kwargs.get("ends") is None and module.graph.find_nodes(op="call_function", target=zero_and_one):
            yield f"{node.name} makes constants of its own"
    for scales in module.graph.find_nodes(op="call_module", target="response"):
        for nodes in joinable(module, scales).values():
            yield f"{nodes[0].name} is computed by itself"


def terms_are_joined(module: fx.GraphModule) -> Iterator[str]:
    """No product is a kernel by itself that could be a part of a sum."""
    for node, *_ in joinable_terms(module.graph):
        yield f"{node.name} adds a product that nobody else reads"


def weights_are_lowered_once(module: fx.GraphModule) -> Iterator[str]:
    """What one call lowers is read from there by every product."""
    calls = module.graph.find_nodes(op="call_function", target=lower)
    if len(calls) > 1:
        yield f"{', '.join(node.name for node in calls)} lower weights"
    targets = {source.target for call in calls for source in call.all_input_nodes}
    for node in module.graph.nodes:
        for source in node.all_input_nodes if node.target in PRODUCTS else ():
            if source.op == "get_attr" and source.target in targets:
                yield f"{node.name} reads {source.target} in the type that it is kept in"


def regions_keep_their_precision(module: fx.GraphModule) -> Iterator[str]:
    """What the forward computes without autocast switches it off."""
    for node in module.graph.nodes:
        if is_wide(node) and getattr(node.target, "__module__", "") != in_full_precision.__module__:
            yield f"{node.name} has the precision of what is around its region"


def pieces_are_recomputed(module: fx.GraphModule) -> Iterator[str]:
    """What is left in the graph costs nothing to keep: inputs and their checks, parameters, λ and scales."""
    for node in module.graph.nodes:
        piece = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Recomputed)
        computed = node.op == "call_function" and node.target not in CHEAP
        if computed and not all(source.op in ("call_module", "call_function") for source in node.all_input_nodes):
            yield f"{node.name} is kept outside of the pieces"
        elif piece and not node.users:
            yield f"nobody reads the piece {node.name}"


CANONICAL = (only_functions_are_called, spellings_are_canonical, nothing_is_written)
FACTS: Mapping[object, tuple[Fact, ...]] = {
    canonicalize: CANONICAL,
    condition: (draws_are_explicit,),
    choose_statistics: (),
    hyperize: (parameters_know_their_response,),
    hold_statistics: (statistics_are_held,),
    pushforward: (tangents_name_their_rule,),
    linearized: (tangents_name_their_rule,),
    perturbed: (tangents_name_their_rule,),
    restore_types: (outputs_have_their_types,),
    simplify: (everything_is_read,),
    join_counters: (batches_are_counted_at_once,),
    join_shifts: (shifts_are_joined,),
    lower_weights: (weights_are_lowered_once,),
    join_terms: (terms_are_joined,),
    keep_precision: (regions_keep_their_precision,),
    recompute: (pieces_are_recomputed,),
}
# These passes end facts: rules emit operations that are not canonical, scales come from one product of all, weights are read
# before their scales are computed, and recompute moves nodes into pieces.
ENDS: Mapping[object, tuple[Fact, ...]] = {
    **dict.fromkeys((pushforward, linearized, perturbed), CANONICAL),
    **dict.fromkeys((join_shifts, lower_weights), (parameters_know_their_response,)),
    recompute: (tangents_name_their_rule, parameters_know_their_response),
}
