"""The pass linearized: a graph of y + dy, linearised before what the forward does last: softmax and its like, or a loss."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import Argument

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.facts import overloads, returns_one_tensor
from fxstn.ir.graphs import filled_in, function_of, map_leaves
from fxstn.ir.node_info import annotate, info_of
from fxstn.ir.staging import call
from fxstn.ir.tangents import ZERO
from fxstn.ir.vocabulary import LINKS, VIEWS
from fxstn.ops.kernels import plus_tangent
from fxstn.passes.effects import is_random
from fxstn.passes.pushforward import Pushforward
from fxstn.rules import RULES
from fxstn.rules.loss import is_layer, is_loss, reduces_to_a_number


def linearized(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph → graph of the linearised output y + dy (paper, Eq. 3.13).

    An output that ends in softmax, log-softmax or sigmoid is linearised before it: link(z + dz). An output that is a loss, or
    a sum of losses and penalties, is computed from the linearised outputs of the layers before it. Otherwise the loss of
    y + dy has no lower bound.

    Raises TransformError as `pushforward` does.
    """

    def add(walk: Pushforward, output: Argument) -> object:
        return _Outputs(walk, output).linearized()

    return Pushforward(module, plan.batch_axes, fold=False).run(add)


class _Outputs:
    """The linearised outputs of a graph.

    values: {node: y + dy, or link(z + dz)}.
    losses: {node between an output that is a loss and what it is computed from: its value at the linearised ones}.
    """

    def __init__(self, walk: Pushforward, output: Argument) -> None:
        self.walk, self.output = walk, output
        self.values: dict[fx.Node, object] = {}
        self.losses: dict[fx.Node, object] = {}
        self.ends: dict[fx.Node, bool] = {}

    def linearized(self) -> object:
        """The output with each node replaced by its linearised value."""
        nodes: list[fx.Node] = []
        map_leaves(self.output, lambda leaf: nodes.append(leaf) if isinstance(leaf, fx.Node) else None)
        for node in nodes:
            if not self.is_loss(node):
                self.value(node)
        return filled_in(self.output, {n: self.loss(n) if self.is_loss(n) else self.value(n) for n in nodes})

    def is_loss(self, node: fx.Node) -> bool:
        """Whether a value is a loss, or one number that is computed from losses and from sums or means of all entries."""
        if node not in self.ends:
            self.ends[node] = self._is_loss(node)
        return self.ends[node]

    def _is_loss(self, node: fx.Node) -> bool:
        if not self._varies(node) or is_layer(function_of(node)):
            return False
        if is_loss(function_of(node)) or reduces_to_a_number(function_of(node), node.args, node.kwargs):
            return True
        varying = [source for source in node.all_input_nodes if self._varies(source)]
        return bool(varying) and all(map(self.is_loss, varying))

    def _is_kept(self, function: Callable[..., Any]) -> bool:
        """Whether y + dy of an operation is used, not the operation of y + dy: layers are linear, and a draw has one result."""
        return is_layer(function) or is_random(function)

    def _varies(self, node: fx.Node) -> bool:
        return node.op == "call_function" and self.walk.tangents[node] is not ZERO

    def loss(self, node: fx.Node) -> object:
        """The value at the linearised outputs of the layers, and of the network where it returns them beside the loss."""
        if node in self.values or not self._varies(node) or self._is_kept(function_of(node)):
            return self.value(node)
        if node not in self.losses:
            of_argument = self.value if is_loss(function_of(node)) else self.loss
            arguments = {source: of_argument(source) for source in node.all_input_nodes}
            self.losses[node] = self._called(node, arguments)
        return self.losses[node]

    def value(self, node: fx.Node) -> object:
        """y + dy; link(z + dz) for y = link(z), and views of it."""
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def _value(self, node: fx.Node) -> object:
        y, dy = self.walk.values[node], self.walk.tangents[node]
        if dy is ZERO:
            return y
        link, views = node, []
        while link.op == "call_function" and link.target in VIEWS and isinstance(link.args[0], fx.Node):
            views.append(link)
            link = link.args[0]
        if link.op != "call_function" or link.target not in LINKS:
            if isinstance(dy, fx.Proxy) and _is_one_tensor(node):
                return operator.add(y, dy)
            return call(plus_tangent, y, map_leaves(dy, lambda tangent: None if tangent is ZERO else tangent))
        before = link.args[0]
        result = self.walk.value(before) + self.walk.tangent(before)
        for step in (link, *reversed(views)):
            result = self._called(step, self.walk.values | {step.args[0]: result})
        return result

    def _called(self, node: fx.Node, values: dict) -> object:
        result: Any = call(function_of(node), *filled_in(node.args, values), **filled_in(node.kwargs, values))
        annotate(result.node, full_precision=info_of(node).full_precision)
        return result


def _is_one_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is certainly a tensor: torch.chunk, and some functions without a schema, return several."""
    function = function_of(node)
    if overloads(function):
        return returns_one_tensor(function)
    return function in RULES and function is not operator.getitem
