"""The pass join_counters: the batch norms of a network count a batch by one operation."""

from __future__ import annotations

from torch import fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import assemble, copied
from fxstn.ops.noise import track_batch, track_batches


def join_counters(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """One `track_batches` for the first `track_batch` of each counter; those with a cumulative average stay, which read it."""
    if len(_first_counts(module.graph)) < 2:
        return module
    module = copied(module)
    graph = module.graph
    first = _first_counts(graph)
    anchor = min(first.values())
    with graph.inserting_before(anchor):
        counters = [graph.node_copy(node.all_input_nodes[0]) for node in first.values()]
        graph.call_function(track_batches, (counters,))
    for node in first.values():
        counter = node.all_input_nodes[0]
        for user in list(node.users):
            user.args = tuple(node.args[1] if value is node else value for value in user.args)
        graph.erase_node(node)
        if not counter.users:
            graph.erase_node(counter)
    graph.lint()
    return assemble(module, graph, "Graph", fx.GraphModule)


def _first_counts(graph: fx.Graph) -> dict[object, fx.Node]:
    """{counter: its first `track_batch` that does nothing else}."""
    result: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=track_batch):
        counter, momentum = node.args
        if momentum is not None and isinstance(counter, fx.Node) and counter.op == "get_attr":
            result.setdefault(counter.target, node)
    return result
