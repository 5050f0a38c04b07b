"""The pass lower_weights: under autocast, one conversion of each weight for all products that read it."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import copied, placeholders
from fxstn.ir.node_info import info_of
from fxstn.ops.precision import lower
from fxstn.passes.effects import has_effect

# What autocast lowers, on every device, and has a weight: positions of the weight and of the bias.
PRODUCTS = dict.fromkeys(
    (F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
     torch.conv_transpose3d), (1, 2),
)  # fmt: skip


def is_lowered(node: fx.Node) -> bool:
    """Whether a node is a product that autocast lowers: not where the forward has switched it off."""
    return node.op == "call_function" and node.target in PRODUCTS and not info_of(node).full_precision


def lower_weights(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Weights and biases of products become results of one call of `lower`.

    They are constants here. Autocast itself keeps its conversions only of weights that require gradients, and would convert
    each at every read, for the primal and for the tangent. Where activations are computed again, so are conversions, which
    then need no memory in between.
    """
    if plan.recompute:
        return module
    module = copied(module)
    graph = module.graph
    readers: dict[str, list[tuple[fx.Node, int]]] = {}
    for node in graph.nodes:
        for position in PRODUCTS[node.target] if is_lowered(node) else ():
            value = node.args[position] if position < len(node.args) else None
            if isinstance(value, fx.Node) and value.op == "get_attr":
                readers.setdefault(str(value.target), []).append((node, position))
    if not readers:
        return module
    names = {str(node.target): node.name for node in graph.find_nodes(op="get_attr")}
    with graph.inserting_after(placeholders(graph)[-1]):
        together = graph.create_node("call_function", lower, ((),), name="lowered_weights")
    with graph.inserting_before(together):
        weights = tuple(graph.create_node("get_attr", target, name=f"{names[target]}_wide") for target in readers)
    together.args = (weights,)
    for index, (target, uses) in enumerate(readers.items()):
        first = min(node for node, _ in uses)
        with graph.inserting_before(first):
            value = graph.create_node("call_function", operator.getitem, (together, index), name=names[target])
        for node, position in uses:
            node.update_arg(position, value)
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return module
