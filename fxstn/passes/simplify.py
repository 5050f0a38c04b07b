"""The pass simplify: drops nodes without readers, merges equal nodes and joins products. It never merges two random draws."""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import assemble
from fxstn.ir.node_info import info_of
from fxstn.ir.vocabulary import is_opaque
from fxstn.ops.response import add_bias
from fxstn.passes.canonicalize import drop_handed_through
from fxstn.passes.effects import has_effect, is_pure, shared_arguments


def _handed_out(graph: fx.Graph) -> set[fx.Node]:
    """Computed values that a user's function gets, or whose memory it gets: it may write into them."""
    result: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and any(
            is_opaque(user.target) or (user in result and node in shared_arguments(user)) for user in node.users
        ):
            result.add(node)
    return result


def _key(node: fx.Node) -> Hashable:
    """What two nodes that compute the same have in common. Raises TypeError for an argument that cannot be hashed."""

    def hashable(value: object) -> Hashable:
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *map(hashable, value))
        if isinstance(value, dict):
            return tuple(sorted((key, hashable(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return ("slice", hashable(value.start), hashable(value.stop), hashable(value.step))
        return (type(value), value)

    precision = info_of(node).full_precision if node.op == "call_function" else ()
    key = (node.op, node.target, precision, hashable(node.args), hashable(node.kwargs))
    hash(key)
    return key


def _product(value: Argument, weight: Argument) -> fx.Node | None:
    """The product W a in a sum with other terms, where all of it is read in one place only."""
    if not isinstance(value, fx.Node) or len(value.users) != 1 or value.kwargs:
        return None
    if value.target is F.linear:
        return value if value.args[1] is weight and not any(value.args[2:]) else None
    terms = value.args[:1] if value.target is add_bias else value.args if value.target is operator.add else ()
    return next((product for term in terms if (product := _product(term, weight))), None)


def _join_products(node: fx.Node) -> None:
    """(W a + b) + (W c + d) → W (a + c) + b + d, where nobody else reads the products: one large product in place of two.

    Such sums are in the linearised output y + dy of a last layer, and in the tangent of a weight tied to an embedding.
    """
    if node.op != "call_function" or node.target is not operator.add or len(node.args) != 2:
        return
    first, rest = node.args
    if not isinstance(first, fx.Node) or first.target is not F.linear or len(first.users) != 1 or first.kwargs:
        return
    second = _product(rest, first.args[1])
    if not isinstance(rest, fx.Node) or second is None or not first < second or first is second:
        return
    if info_of(first).full_precision != info_of(second).full_precision:
        return
    with node.graph.inserting_before(second):
        total = node.graph.call_function(operator.add, (first.args[0], second.args[0]))
    second.args = (total, *first.args[1:])
    node.replace_all_uses_with(rest)
    node.graph.erase_node(node)
    node.graph.erase_node(first)


def simplify(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Removes dead values and what is computed twice, and joins products. Generates the code.

    An update of running statistics is never dead, nor is a user's function.
    """
    module = drop_handed_through(module)
    seen: dict[Hashable, fx.Node] = {}
    handed_out = _handed_out(module.graph)
    for node in list(module.graph.nodes):
        if node in handed_out or not is_pure(node):
            continue
        try:
            first = seen.setdefault(_key(node), node)
        except TypeError:  # an argument that cannot be hashed: leave the node alone
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(has_effect)
    for node in list(module.graph.nodes):
        _join_products(node)
    module.graph.eliminate_dead_code(has_effect)
    module.graph.lint()
    return assemble(module, module.graph, "Graph", fx.GraphModule)
