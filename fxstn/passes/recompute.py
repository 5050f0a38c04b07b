"""The pass recompute, optional and last: activations are computed again in the backward pass instead of being stored."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from fxstn.frontends.interface import Plan
from fxstn.ir.graphs import assemble
from fxstn.ops.inputs import REQUIREMENTS
from fxstn.ops.scaled import scales_and_shifts, zero_and_one

CHEAP = {*REQUIREMENTS, scales_and_shifts, zero_and_one, operator.getitem}  # of inputs, parameters and λ


class Recomputed(nn.Module):
    """A piece of a graph that keeps its inputs only; its backward runs it a second time, with the same random draws."""

    def __init__(self, piece: fx.GraphModule) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *inputs: object) -> object:
        # The backward pass runs the piece again, when tensors frozen now may be trainable again: aliases stay constant.
        fixed = [x.detach() if isinstance(x, Tensor) and not x.requires_grad else x for x in inputs]
        return checkpoint(self.piece, *fixed, use_reentrant=False)


def recompute(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Where the plan asks for it, the same graph in about √n pieces that keep nothing but their inputs.

    It costs a second forward; memory then grows as √n (Chen et al. 2016, arXiv 1604.06174). The graph must not update running
    statistics: they would count a batch twice.
    """
    if not plan.recompute:
        return module
    nodes = list(module.graph.nodes)
    outside = _outside(nodes)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in nodes:  # parameters and row scales, which need no more than the graph's inputs, come first
        if node in outside:
            values[node] = graph.node_copy(node, values.__getitem__)
    result = assemble(module, graph)
    for number, piece in enumerate(_pieces([node for node in nodes if node not in outside and node.op != "output"])):
        inputs, outputs = _boundary(piece)
        result.add_module(f"piece_{number}", Recomputed(_extract(module, piece, inputs, outputs)))
        call = graph.call_module(f"piece_{number}", tuple(values[node] for node in inputs))
        for position, node in enumerate(outputs):
            values[node] = graph.call_function(operator.getitem, (call, position))
    graph.output(map_arg(nodes[-1].args[0], values.__getitem__))
    return assemble(result, graph, "Graph", fx.GraphModule)


def _outside(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What costs nothing to keep: inputs and their checks, parameters, λ and row scales."""
    outside: set[fx.Node] = set()
    for node in nodes:
        cheap = node.op == "call_module" or node.target in CHEAP
        if node.op in ("placeholder", "get_attr") or (cheap and outside.issuperset(node.all_input_nodes)):
            outside.add(node)
    return outside


def _pieces(nodes: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
    """Runs of nodes, each cut, of those near an equal share, where the fewest values are needed later."""
    place = {node: i for i, node in enumerate(nodes)}
    last = [max((place.get(user, len(nodes)) for user in node.users), default=i) for i, node in enumerate(nodes)]
    alive = [sum(last[j] >= i for j in range(i)) for i in range(len(nodes))]
    share = max(2, math.isqrt(len(nodes)))
    cuts = [0]
    for target in range(share, len(nodes) - share // 2, share):
        near = range(target - share // 2, target + share // 2)
        cuts.append(min((i for i in near if i > cuts[-1]), key=lambda i: (alive[i], abs(i - target))))
    return [nodes[start:stop] for start, stop in pairwise([*cuts, len(nodes)])]


def _boundary(piece: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Values that a piece takes from outside, and those of its own that others read."""
    inside = set(piece)
    inputs = dict.fromkeys(value for node in piece for value in node.all_input_nodes if value not in inside)
    return list(inputs), [node for node in piece if any(user not in inside for user in node.users)]


def _extract(
    module: fx.GraphModule, piece: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in inputs}
    for node in piece:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in outputs))
    return fx.GraphModule(module, graph, "Piece")
