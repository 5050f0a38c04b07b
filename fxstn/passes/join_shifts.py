"""The pass join_shifts: the scales of all layers, and what their biases add, by one product in place of a few kernels each."""

from __future__ import annotations

import operator
from typing import cast

from torch import fx
from torch.fx.node import Argument

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import copied
from fxstn.ops.response import ResponseTree
from fxstn.ops.scaled import bias_shift, scaled_tangent, scales_and_shifts, zero_and_one
from fxstn.passes.effects import has_effect
from fxstn.passes.lower_weights import is_lowered

Pair = tuple[int, int]  # blocks of scales: of a weight, and of the bias of the same layer


def join_shifts(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Each `bias_shift` of two blocks becomes a result of one `scales_and_shifts`, in place of the scales of the bias.

    A bias whose scales are read elsewhere, too, or whose weight has another bias, stays as it is. All layers get the same
    constants for their sums.
    """
    module = copied(module)
    graph = module.graph
    scales = next(iter(graph.find_nodes(op="call_module", target="response")), None)
    if scales is None:
        return module
    layers = graph.find_nodes(op="call_function", target=scaled_tangent)
    with graph.inserting_before(scales):
        if layers:
            ends = graph.create_node("call_function", zero_and_one, scales.args, name="zero_and_one")
            for node in layers:
                node.update_kwarg("ends", ends)
        if shifts := joinable(module, scales):
            _join(module, scales, shifts)
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return module


def _join(module: fx.GraphModule, scales: fx.Node, shifts: dict[Pair, list[fx.Node]]) -> None:
    """Puts `scales_and_shifts` in place of `scales`, before it."""
    graph, tree = module.graph, module.get_submodule("response")
    assert isinstance(tree, ResponseTree)
    flat = graph.create_node("get_attr", "response.flat_U", name="flat_U")
    biases = tuple(graph.node_copy(_bias(nodes[0])) for nodes in shifts.values())
    for nodes in shifts.values():
        for node in nodes:
            node.replace_all_uses_with(node.all_input_nodes[-1])
    blocks = [node for node in scales.users if node.target is operator.getitem]
    lowered = tuple(sorted(cast(int, node.args[1]) for node in blocks if all(map(_is_of_product, node.users))))
    arguments = (flat, scales.args[0], tree.flat_sizes, tuple(shifts), biases, lowered)
    joint = graph.create_node("call_function", scales_and_shifts, arguments, name="scales_and_shifts")
    scales.replace_all_uses_with(joint)


def _bias(shift: fx.Node) -> fx.Node:
    return shift.all_input_nodes[1]


def _is_of_product(node: fx.Node) -> bool:
    """Whether a reader of scales is the tangent of a layer that autocast lowers, or a shift that nobody reads any more."""
    if node.target is not scaled_tangent:
        return node.target is bias_shift and not node.users
    return isinstance(node.args[1], fx.Node) and is_lowered(node.args[1])


def _block(value: Argument, scales: fx.Node) -> int | None:
    """The number of the block that a value is, if it is one."""
    if not (isinstance(value, fx.Node) and value.target is operator.getitem and value.args[0] is scales):
        return None
    return cast(int, value.args[1])


def joinable(module: fx.GraphModule, scales: fx.Node) -> dict[Pair, list[fx.Node]]:
    """{blocks: their shifts} of pairs that have no block in common. U is real, so that the bias must be, too."""
    by_pair: dict[Pair, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="call_function", target=bias_shift):
        weight, bias, own = node.args
        pair = _block(weight, scales), _block(own, scales)
        if pair[0] is None or pair[1] is None or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            continue
        if not operator.attrgetter(str(bias.target))(module).is_complex():
            by_pair.setdefault((pair[0], pair[1]), []).append(node)
    result: dict[Pair, list[fx.Node]] = {}
    for pair, nodes in by_pair.items():
        alone = (
            set(nodes[0].all_input_nodes[-1].users) == set(nodes) and len({_bias(node).target for node in nodes}) == 1
        )
        if alone and not set(pair) & {block for other in result for block in other}:
            result[pair] = nodes
    return result
