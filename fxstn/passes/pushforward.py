"""The pass pushforward: one graph that computes the primal and its tangent together, by the rule table."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex, cast

from torch import fx
from torch.fx.node import Argument, Target

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.frontends.live.opaque import opaque_tangent
from fxstn.ir.errors import Diagnostic, TransformError, module_path, operation_name, source_of
from fxstn.ir.graphs import assemble, filled_in, function_of, map_leaves
from fxstn.ir.node_info import annotate, copy_facts, info_of
from fxstn.ir.staging import call
from fxstn.ir.tangents import BATCH_FIRST, SHARED, ZERO, BatchAxes, Scaled, all_zero
from fxstn.ir.vocabulary import is_opaque
from fxstn.ops.kernels import as_results_of, cast_tangent, zeros_tangent
from fxstn.ops.response import for_all_examples, mean_over_examples, pick_rows, scale_channels
from fxstn.rules import RULES, NoRule, apply_rule, kind_of


class _Emitter(fx.proxy.GraphAppendingTracer):
    """Names what a rule emits for node `conv1`: its tangent d_conv1 (by the walk below), the steps to it t_conv1, …"""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.source: fx.Node | None = None

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
        annotate(node, scope=info_of(self.source).scope)
        return node


class Pushforward:
    """Walks a canonical graph once, node by node, and emits each value and its tangent.

    values, tangents: {node: its value and its tangent in the new graph}. A tangent is a proxy, ZERO, Scaled, or a structure.
    by_name: {name of a copied node: its value}.
    fold: whether each tangent is added to its value on the spot, so that only weights have tangents.
    """

    def __init__(self, module: fx.GraphModule, batch_axes: BatchAxes, fold: bool) -> None:
        self.module, self.fold, self.batch_axes = module, fold, batch_axes
        self.graph = fx.Graph()
        self.emitter = _Emitter(self.graph)
        self.values: dict[fx.Node, fx.Proxy] = {}
        self.tangents: dict[fx.Node, object] = {}
        self.by_name: dict[str, fx.Proxy] = {}
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
        calls = node.op == "call_function"
        tangents = tuple(self.tangent(argument) for argument in node.args) if calls else ()
        if not calls or all_zero((tangents, self.tangent(node.kwargs))):
            self.values[node], self.tangents[node] = self.copy(node), ZERO
            if (response := info_of(node).response) is not None:
                self.tangents[node] = self._scaled_tangent(node, self._direction(node, self.by_name[response]))
            return
        derived = info_of(node).scales is not None
        tangents = tuple(
            map_leaves(tangent, partial(self._for_rule, node=node, derived=derived, position=i))
            for i, tangent in enumerate(tangents)
        )
        try:
            y, dy = self._apply(node, tangents)
        except NoRule as reason:
            self.problems.append(_no_rule(node, str(reason)))
            y, dy = self.copy(node), ZERO
        kind = kind_of(function_of(node), tangents)
        copy_facts(y.node, node)
        annotate(y.node, rule=kind, operation=operation_name(function_of(node)))
        y.node._rename(node.name)
        if isinstance(dy, fx.Proxy) and dy.node.name.startswith("t_"):
            dy.node._rename(f"d_{node.name}")
        if derived and dy is not ZERO:
            dy = self._scaled_tangent(node, dy)
            one = sum(not all_zero((tangent,)) for tangent in tangents) == 1
            if self.fold and kind != "linear" and not (kind == "bilinear" and one):
                self.problems.append(_no_rule(node, "on a weight that moves by a finite step: only method 'delta' can"))
        if self.fold and isinstance(dy, fx.Proxy):
            y, dy = operator.add(y, dy), ZERO
        self.values[node], self.tangents[node] = y, dy

    def _apply(self, node: fx.Node, tangents: tuple) -> tuple[Any, Any]:
        """(y, dy) of a node. Raises NoRule."""
        function, named = function_of(node), self.tangent(node.kwargs)
        if function is operator.getitem and isinstance(tangents[0], tuple):
            return self.copy(node), operator.getitem(tangents[0], cast(SupportsIndex, node.args[1]))
        args, kwargs = self.value(node.args), dict(self.value(node.kwargs))
        rule = RULES.get(function)
        if self.fold and rule and rule.finite:
            return rule.finite(tangents, args, kwargs), ZERO
        apply = opaque_tangent if is_opaque(function) else apply_rule
        return apply(function, tangents, args, kwargs, dict(named))

    def _for_rule(self, tangent: object, node: fx.Node, derived: bool, position: int) -> object:
        """What a rule gets: of a structured tangent, the response alone where the rows stay apart, else all of it.

        An operation that takes no structured tangent gets the product. Parameters that respond are read by layers alone, but
        for graphs of inputs of other sizes, where a lookup may be one of constants.
        """
        if not isinstance(tangent, Scaled):
            return tangent
        if derived:
            return tangent.response
        rule = RULES.get(function_of(node))
        if rule is None or position not in rule.reads or tangent.axis not in rule.reads[position].axes:
            scale: Any = mean_over_examples(tangent.scale)
            return scale_channels(cast(Any, tangent.response), scale, tangent.axis)
        axis = self.batch_axes.get(node.name, BATCH_FIRST)
        if axis is None:
            return replace(tangent, scale=for_all_examples(tangent.scale, 1, f"module '{module_path(node)}'"))
        if axis == SHARED:
            return replace(tangent, scale=mean_over_examples(tangent.scale))
        return replace(tangent, batch_axis=axis)

    def _direction(self, node: fx.Node, response: fx.Proxy) -> fx.Proxy:
        """The response R of a parameter, in the parameter's type: R is float32 at least."""
        value = self.values[node]
        if response is value:
            return value
        direction: Any = cast_tangent(cast(Any, response), cast(Any, value))
        direction.node._rename(f"{node.name}_response")
        return cast(fx.Proxy, direction)

    def _scaled_tangent(self, node: fx.Node, response: object) -> Scaled:
        """The tangent of a parameter, or of a value computed from it row by row."""
        scales = info_of(node).scales
        assert scales is not None, node
        scale: Any = self.by_name[scales.name]
        axis = cast(int, scales.axis)  # None for several values in one, each of which has an axis of its own
        return Scaled(pick_rows(scale, scales.runs) if scales.runs else scale, response, axis)

    def run(self, finish: Callable[[Pushforward, Argument], object]) -> fx.GraphModule:
        """finish: gets the walk and the output's structure of nodes, and returns the new output's, of proxies."""
        for node in self.module.graph.nodes:
            if node.op != "output":
                self.visit(node)
                continue
            self.emitter.source = node
            result = finish(self, node.args[0])
            if self.problems:
                raise TransformError(self.problems)
            output = self.graph.output(
                map_leaves(result, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else leaf)
            )
            copy_facts(output, node)
        return assemble(self.module, self.graph)


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

    The forward of the methods "stn" and "centered". It is exact, because hyperlayers are linear in their parameters.

    Raises TransformError where a weight computed from weights would have to move by a finite step.
    """
    return Pushforward(module, plan.batch_axes, fold=True).run(lambda walk, output: walk.value(output))
