"""Which values that all examples share a perturbation per example can move, and what computes them, one for each example."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Argument

from fxstn.ir.errors import module_path, operation_name
from fxstn.ir.graphs import function_of, map_leaves
from fxstn.ir.node_info import info_of
from fxstn.ir.staging import call, draws
from fxstn.ir.tangents import SHARED, BatchAxes, BatchAxis, Scaled, ScaledParts
from fxstn.ir.vocabulary import is_opaque, is_size
from fxstn.ops.by_example import by_example, each_example
from fxstn.ops.synced import BATCH_NORMS
from fxstn.rules import RULES

SIZED = (Tensor.expand, Tensor.repeat)  # (x, *sizes): a size counts the examples where the result has rows of them
WRITTEN_OUT = (F.scaled_dot_product_attention,)  # has fused kernels that cannot be vectorised; its rule does without


def obstacle(node: fx.Node, axes: BatchAxes) -> str | None:
    """Why a value that all examples share cannot be one for each of them; None where it can.

    It can where everything that is computed from it stays shared, or meets values whose examples are known.
    """
    pending, seen = [node], {node}
    while pending:
        value = pending.pop()
        for user in value.users:
            if user in seen or user.op == "output" or is_size(user) or not user.users or draws(user.target):
                continue
            seen.add(user)
            if user.name not in axes:
                return f"{_named(user)} makes no tensor of it"
            if axes[user.name] == SHARED:
                if reason := _loop(user):
                    return reason
                pending.append(user)
            elif reason := _obstacle_of_meeting(user, axes):
                return reason
    return _loop(node)


def _loop(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    function = function_of(node)
    looped = is_opaque(function) or (function in RULES and RULES[function].finite is not None)
    return f"{_named(node)} runs for all examples at once" if looped else None


def _named(node: fx.Node) -> str:
    path = module_path(node)
    return operation_name(node.target) + (f" in '{path}'" if path else "")


def _obstacle_of_meeting(node: fx.Node, axes: BatchAxes) -> str | None:
    where = _named(node)
    if axes[node.name] is None:
        return f"the examples are not along one dimension of {where}, which reads what all share"
    if node.target in BATCH_NORMS:
        return f"{where} joins the examples"
    lost = [source for source in node.all_input_nodes if axes.get(source.name, SHARED) is None]
    if lost:
        return f"the examples are not along one dimension of {_named(lost[0])}, which {where} reads"
    return _loop(node)


def computes_weight(node: fx.Node) -> bool:
    """Whether a layer takes as its weight what is computed from a parameter, so that one for each example would be large."""
    for user in node.users:
        rule = RULES.get(user.target) if callable(user.target) else None
        weights = [i for i, reads in rule.reads.items() if reads.role == "weight"] if rule is not None else []
        if any(user.args[i] is node for i in weights if i < len(user.args)):
            return True
        if info_of(user).scales and computes_weight(user):
            return True
    return False


def leaves_of(structure: object) -> list[object]:
    """All leaves of a structure of arguments."""
    leaves: list[object] = []
    map_leaves(structure, leaves.append)
    return leaves


class Piece:
    """A graph of its own for one operation, of which values of the graph around it are the placeholders."""

    def __init__(self, node: fx.Node, axes: BatchAxes) -> None:
        self.node, self.axes, self.graph = node, axes, fx.Graph()
        self.operands: dict[object, tuple[Any, fx.Proxy, BatchAxis | None]] = {}  # value, placeholder, place
        self.divided: object = None  # key of the operand that counts the examples
        place = axes[node.name]
        if (
            node.target in SIZED
            and place is not None
            and place != SHARED
            and isinstance(node.args[1 + place.axis], fx.Node)
        ):
            self.divided = node.args[1 + place.axis]

    def filled(self, structure: object, source: fx.Node, tracer: fx.proxy.TracerBase) -> Any:
        """The value of a node that the operation reads, or its tangent, with placeholders in place of what it is made of."""
        place = self.axes.get(source.name, SHARED)

        def operand(value: Any, place: BatchAxis | None, key: object = None) -> fx.Proxy:
            key = key or value.node
            if key not in self.operands:
                placeholder = self.graph.placeholder(f"x{len(self.operands)}")
                self.operands[key] = value, fx.Proxy(placeholder, tracer), place
            return self.operands[key][1]

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, ScaledParts):
                return ScaledParts(tuple(None if part is None else fill(part) for part in leaf.parts))
            if isinstance(leaf, Scaled):
                scale = operand(by_example(leaf.scale), SHARED, (leaf.scale.node, "scale"))
                return replace(leaf, scale=scale, response=fill(leaf.response))
            if not isinstance(leaf, fx.Proxy):
                return leaf
            return operand(leaf, place, source if source is self.divided else None)

        return map_leaves(structure, fill)

    def finish(self, result: object) -> Any:
        """What computes the result in the graph around the piece: a structure as `result`, one value for each example."""
        proxies = [leaf for leaf in leaves_of(result) if isinstance(leaf, fx.Proxy)]
        nodes = [leaf.node for leaf in proxies]
        self.graph.output(cast(Argument, nodes[0] if len(nodes) == 1 else tuple(nodes)))
        self.graph.eliminate_dead_code()
        values, _, places = zip(*self.operands.values(), strict=True)
        place = self.axes[self.node.name]
        assert place is not None
        divided = list(self.operands).index(self.divided) if self.divided in self.operands else None
        piece = fx.GraphModule({}, self.graph, "Piece")
        outcome: Any = each_example(function_of(self.node), piece.forward, places, place, divided)(*values)
        numbers = {node: number for number, node in enumerate(nodes)}

        def of_outcome(leaf: object) -> object:
            if not isinstance(leaf, fx.Proxy):
                return leaf
            return outcome if len(nodes) == 1 else call(operator.getitem, outcome, numbers[leaf.node])

        return map_leaves(result, of_outcome)
