"""The pass keep_precision: what the forward computes without autocast is computed without it, and so are its tangents."""

from __future__ import annotations

import operator

from torch import fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.facts import is_view
from fxstn.ir.graphs import assemble, copied, function_of
from fxstn.ir.node_info import info_of
from fxstn.ir.vocabulary import is_size
from fxstn.ops.precision import in_full_precision


def keep_precision(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Operations of regions in which the forward switches autocast off switch it off themselves. Generates the code.

    It follows all passes that look at what a node calls.
    """
    if not any(map(is_wide, module.graph.nodes)):
        return module
    graph = copied(module).graph
    for node in filter(is_wide, graph.nodes):
        for device_type in info_of(node).full_precision:
            node.target = in_full_precision(function_of(node), device_type)
    return assemble(module, graph, "Graph", fx.GraphModule)


def has_regions(graph: object) -> bool:
    """Whether a graph has operations that run without autocast."""
    return isinstance(graph, fx.GraphModule) and any(info_of(node).full_precision for node in graph.graph.nodes)


def is_wide(node: fx.Node) -> bool:
    """Whether a node is in such a region and computes something."""
    if node.op != "call_function" or not info_of(node).full_precision:
        return False
    return not (node.target in (operator.getitem, getattr) or is_size(node) or is_view(node.target))
