"""The pass pushforward: one graph that computes the primal and its tangent together, by the rule table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, SupportsIndex, cast

from torch import Tensor, fx
from torch.fx.node import Argument, Target

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.frontends.live.opaque import opaque_tangent
from fxstn.ir.errors import Diagnostic, TransformError, module_path, operation_name, source_of
from fxstn.ir.graphs import assemble, filled_in, function_of, map_leaves
from fxstn.ir.node_info import annotate, copy_facts, info_of
from fxstn.ir.staging import call
from fxstn.ir.tangents import SHARED, ZERO, BatchAxes, Scaled, ScaledParts, all_zero
from fxstn.ir.vocabulary import is_opaque, is_size
from fxstn.ops.by_example import by_example, each_example, mean_of_examples, of_one_example
from fxstn.ops.kernels import as_results_of, cast_tangent, zeros_tangent
from fxstn.ops.response import for_all_examples, materialised
from fxstn.passes.by_example import WRITTEN_OUT, Piece, computes_weight, leaves_of, obstacle
from fxstn.passes.structured_tangents import StructuredTangents, moved_parameters
from fxstn.rules import RULES, NoRule, apply_rule, kind_of


class _Emitter(fx.proxy.GraphAppendingTracer):
    """Names what a rule emits for node `conv1`: its tangent d_conv1 (by the walk below), the steps to it t_conv1, …"""

    def __init__(self, graph: fx.Graph, source: fx.Node | None = None) -> None:
        super().__init__(graph)
        self.source = source

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        assert self.source is not None
        node = self.graph.create_node(kind, target, args, kwargs, f"t_{self.source.name}", type_expr)
        source = info_of(self.source)
        annotate(node, scope=source.scope, full_precision=source.full_precision)
        return node


class Pushforward(StructuredTangents):
    """Walks a canonical graph once, node by node, and emits each value and its tangent.

    values, tangents: {node: its value and its tangent in the new graph}. A tangent is a proxy, ZERO, Scaled, or a structure.
    by_name: {name of a copied node: its value}.
    fold: whether each tangent is added to its value on the spot, so that only weights have tangents.
    by_example: nodes that all examples share, and whose tangent, or value where it is folded, is one for each example.
    """

    def __init__(self, module: fx.GraphModule, batch_axes: BatchAxes, fold: bool) -> None:
        self.module, self.fold, self.batch_axes = module, fold, batch_axes
        self.graph = fx.Graph()
        self.emitter = _Emitter(self.graph)
        self.values: dict[fx.Node, fx.Proxy] = {}
        self.tangents: dict[fx.Node, object] = {}
        self.by_name: dict[str, fx.Proxy] = {}
        self.by_example: set[fx.Node] = set()
        self.moved = moved_parameters(module.graph) if fold else set()
        self.problems: list[Diagnostic] = []

    def value(self, structure: object) -> Any:
        """The structure with each node replaced by its value."""
        return filled_in(structure, self.values)

    def tangent(self, structure: object) -> Any:
        """The structure with each node replaced by its tangent and everything else by ZERO."""
        if isinstance(structure, slice):
            return ZERO
        return map_leaves(structure, lambda leaf: self.tangents[leaf] if isinstance(leaf, fx.Node) else ZERO)

    def copy(self, node: fx.Node) -> fx.Proxy:
        new = fx.Proxy(self.graph.node_copy(node, lambda old: self.values[old].node), self.emitter)
        self.by_name[node.name] = new
        return new

    def visit(self, node: fx.Node) -> None:
        self.emitter.source = node
        info, calls = info_of(node), node.op == "call_function"
        tangents = tuple(self.tangent(argument) for argument in node.args) if calls else ()
        named = self.tangent(node.kwargs) if calls else {}
        if calls and self._is_by_example(node, tangents):
            self._visit_by_example(node)
            return
        if not calls or all_zero((tangents, named)):
            self.values[node], self.tangents[node] = self.copy(node), ZERO
            if info.response is not None:
                direction = self._direction(node, self.by_name[info.response])
                self._enter(node, self.part(info.scales[0], direction))
            return
        y: Any
        dy: Any
        reads = False
        try:
            if info.scales:
                y, dy = self.derived(node)
            else:
                y, dy, reads = self.read(node, tangents, dict(named))
        except NoRule as reason:
            self.problems.append(_no_rule(node, str(reason)))
            y, dy = self.copy(node), ZERO
        copy_facts(y.node, node)
        kind = "hyperlayer" if reads else kind_of(function_of(node), ())
        annotate(y.node, rule=kind, operation=operation_name(function_of(node)))
        y.node._rename(node.name)
        if isinstance(dy, fx.Proxy) and dy.node.name.startswith("t_"):
            dy.node._rename(f"d_{node.name}")
        if self.fold and isinstance(dy, fx.Proxy):
            y, dy = operator.add(y, dy), ZERO
        self.values[node], self.tangents[node] = y, dy

    def _enter(self, node: fx.Node, part: Scaled) -> None:
        """Enter a parameter with its tangent, or moved by all of it where what reads it is not linear in it."""
        if node not in self.moved:
            self.tangents[node] = ScaledParts((part,))
            return
        if self.batch_axes and not computes_weight(node) and obstacle(node, self.batch_axes) is None:
            moved = each_example(materialised, partial(_moved, axis=part.axis), (SHARED,) * 3, SHARED)
            self.values[node] = moved(self.values[node], by_example(part.scale), part.response)
            self.by_example.add(node)
            return
        scale = for_all_examples(part.scale, 1, f"the weight of '{module_path(node)}', which is computed")
        self.values[node] = operator.add(self.values[node], call(materialised, scale, part.response, part.axis))

    def _is_by_example(self, node: fx.Node, tangents: tuple) -> bool:
        """Whether one of the values that a node reads is one for each example, or its own, which all share, begins to be."""
        if any(source in self.by_example for source in node.all_input_nodes):
            return True
        if self.batch_axes.get(node.name) != SHARED or info_of(node).scales:
            return False
        reads = any(isinstance(tangent, ScaledParts) for tangent in leaves_of(tangents))
        return reads and obstacle(node, self.batch_axes) is None

    def _visit_by_example(self, node: fx.Node) -> None:
        """One operation for each example. A value that is not folded is computed once."""
        if node.name not in self.batch_axes or is_size(node):  # a size is that of one example
            alike = {source: of_one_example(cast(Any, self.values[source])) for source in node.all_input_nodes}
            function, args, kwargs = function_of(node), filled_in(node.args, alike), filled_in(node.kwargs, alike)
            self.values[node], self.tangents[node] = cast(Any, call(function, *args, **kwargs)), ZERO
            return
        piece = Piece(node, self.batch_axes)
        inner = Pushforward(self.module, {}, self.fold)
        inner.graph, inner.emitter = piece.graph, _Emitter(piece.graph, node)
        for source in node.all_input_nodes:
            inner.values[source] = piece.filled(self.values[source], source, inner.emitter)
            inner.tangents[source] = piece.filled(self.tangents[source], source, inner.emitter)
        try:
            tangents, named = tuple(map(inner.tangent, node.args)), dict(inner.tangent(node.kwargs))
            if all_zero((tangents, named)):
                y, dy, reads = *inner.apply(node, tangents, named, inner.values), False
            else:
                y, dy, reads = inner.read(node, tangents, named)
        except NoRule as reason:
            self.problems.append(_no_rule(node, str(reason)))
            self.values[node], self.tangents[node] = self.copy(node), ZERO
            return
        if self.fold:
            self.values[node], self.tangents[node] = piece.finish(y if dy is ZERO else operator.add(y, dy)), ZERO
        else:
            self.values[node], self.tangents[node] = self.copy(node), ZERO if all_zero(dy) else piece.finish(dy)
        if self.batch_axes[node.name] == SHARED and (self.fold or self.tangents[node] is not ZERO):
            self.by_example.add(node)
        kind = "hyperlayer" if reads else kind_of(function_of(node), ())
        annotate(self.values[node].node, rule=kind, operation=operation_name(function_of(node)))

    def apply(self, node: fx.Node, tangents: tuple, named: dict, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        function = function_of(node)
        if function is operator.getitem and isinstance(tangents[0], tuple):
            return self.copy(node), operator.getitem(tangents[0], cast(SupportsIndex, node.args[1]))
        args, kwargs = filled_in(node.args, values), dict(filled_in(node.kwargs, values))
        rule = RULES.get(function)
        if self.fold and rule and rule.finite:
            return rule.finite(tangents, args, kwargs), ZERO
        if function in WRITTEN_OUT and all_zero((tangents, named)):
            return RULES[function].apply(tangents, args, kwargs)
        apply = opaque_tangent if is_opaque(function) else apply_rule
        return apply(function, tangents, args, kwargs, named)

    def _direction(self, node: fx.Node, response: fx.Proxy) -> fx.Proxy:
        """The response R of a parameter, in the parameter's type: R is float32 at least."""
        value = self.values[node]
        if response is value:
            return value
        direction: Any = cast_tangent(cast(Any, response), cast(Any, value))
        direction.node._rename(f"{node.name}_response")
        return cast(fx.Proxy, direction)

    def run(self, finish: Callable[[Pushforward, Argument], object]) -> fx.GraphModule:
        """finish: gets the walk and the output's structure of nodes, and returns the new output's, of proxies."""
        for node in self.module.graph.nodes:
            if node.op != "output":
                self.visit(node)
                continue
            self.emitter.source = node
            for shared in self.by_example:  # a result has no place for more
                moved: dict = self.values if self.fold else self.tangents
                moved[shared] = mean_of_examples(cast(Any, moved[shared]))
            result = finish(self, node.args[0])
            if self.problems:
                raise TransformError(self.problems)
            output = self.graph.output(
                map_leaves(result, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)
            )
            copy_facts(output, node)
        return assemble(self.module, self.graph)


def _moved(parameter: Tensor, scale: Tensor, response: Tensor, axis: int) -> Tensor:
    return parameter + materialised(scale, response, axis)


def _no_rule(node: fx.Node, reason: str) -> Diagnostic:
    return Diagnostic(
        module_path(node),
        f"{operation_name(function_of(node))} has no tangent rule ({reason})",
        source_of(node),
        "register one (CONTRIBUTING.md, 'Add a tangent rule'), or freeze the parameters it depends on",
    )


def pushforward(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph f(x, delta) → graph (y, dy) with dy = J_yw Θ delta, in the model's own output structure.

    delta moves weights; condition, an input that the pass `condition` adds, moves strengths of random operations.

    dy is real zeros where nothing depends on the weights, and None for leaves that are not float.

    Raises TransformError that lists every operation that a tangent reaches and that has neither a rule nor a derivative in
    torch.
    """

    def pair(walk: Pushforward, output: Argument) -> object:
        def real(leaf: object) -> object:
            if not isinstance(leaf, fx.Node):
                return None
            y, dy = walk.values[leaf], walk.tangents[leaf]
            dy = walk.dense(dy)
            if isinstance(dy, (tuple, list)):
                return call(
                    as_results_of, y, tuple(of_result(call(operator.getitem, y, i), t) for i, t in enumerate(dy))
                )
            return of_result(y, dy)

        def of_result(y: fx.Proxy, dy: object) -> object:
            return call(zeros_tangent, y) if dy is ZERO else dy

        return walk.value(output), map_leaves(output, real)

    return Pushforward(module, plan.batch_axes, fold=False).run(pair)


def perturbed(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph → graph of f(x; w₀ + Θ delta), not linearised: each hyperlayer's tangent is added on the spot.

    The forward of the methods "stn" and "centered". It is exact, because hyperlayers are linear in their parameters. What
    something else reads, such as weight norm, is moved itself, by one perturbation for the whole batch.
    """
    return Pushforward(module, plan.batch_axes, fold=True).run(lambda walk, output: walk.value(output))
