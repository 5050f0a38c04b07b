"""Pass 5, pushforward: one graph that computes the primal and its tangent together, by the rule table."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate, map_arg

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.frontends.live.opaque import opaque_tangent
from fxstn.ir.errors import Diagnostic, TransformError, module_path, operation_name, source_of
from fxstn.ir.graphs import assemble
from fxstn.ir.node_info import annotate, copy_facts, info_of
from fxstn.ir.staging import call
from fxstn.ir.tangents import BATCH_FIRST, ZERO, BatchAxes, Scaled, all_zero
from fxstn.ir.vocabulary import LINKS, VIEWS, is_opaque
from fxstn.ops.kernels import zeros_tangent
from fxstn.ops.response import for_all_examples, pick_rows
from fxstn.rules import RULES, NoRule, apply_rule, kind_of


class _Emitter(fx.proxy.GraphAppendingTracer):
    """Names what a rule emits for node `conv1`: its tangent d_conv1 (by the walk below), the steps to it t_conv1, …"""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.source: fx.Node | None = None

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        assert self.source is not None
        node = self.graph.create_node(kind, target, args, kwargs, f"t_{self.source.name}", type_expr)
        annotate(node, scope=info_of(self.source).scope)
        return node


class _Pushforward:
    """Walks a canonical graph once; `values` and `tangents` map its nodes to those of the new graph."""

    def __init__(self, module: fx.GraphModule, batch_axes: BatchAxes, fold: bool) -> None:
        self.module, self.fold, self.batch_axes = module, fold, batch_axes
        self.graph = fx.Graph()
        self.emitter = _Emitter(self.graph)
        self.values: dict[fx.Node, fx.Proxy] = {}
        self.tangents: dict[fx.Node, Any] = {}
        self.named: dict[str, fx.Proxy] = {}
        self.problems: list[Diagnostic] = []

    def value(self, structure: Any) -> Any:
        lookup: Any = self.values.__getitem__
        return map_arg(structure, lookup)

    def tangent(self, structure: Any) -> Any:
        """The structure with each node replaced by its tangent and everything else by ZERO."""
        if isinstance(structure, slice):
            return ZERO
        lookup: Any = lambda leaf: self.tangents[leaf] if isinstance(leaf, fx.Node) else ZERO  # noqa: E731
        return map_aggregate(structure, lookup)

    def copy(self, node: fx.Node) -> fx.Proxy:
        new = fx.Proxy(self.graph.node_copy(node, lambda old: self.values[old].node), self.emitter)
        self.named[node.name] = new
        return new

    def visit(self, node: fx.Node) -> None:
        self.emitter.source = node
        tangents = tuple(self.tangent(argument) for argument in node.args) if node.op == "call_function" else ()
        if all_zero(tangents) and all_zero(self.tangent(node.kwargs) if node.op == "call_function" else ()):
            self.values[node], self.tangents[node] = self.copy(node), ZERO
            if (response := info_of(node).response) is not None:
                self.tangents[node] = self._structured(node, self.named[response])
            return
        derived = info_of(node).scales is not None
        tangents = map_aggregate(tangents, lambda tangent: self._passed(tangent, node, derived))  # type: ignore[assignment]
        try:
            y, dy = self._apply(node, tangents)
        except NoRule as reason:
            self.problems.append(_no_rule(node, str(reason)))
            y, dy = self.copy(node), ZERO
        kind = kind_of(node.target, tangents)  # type: ignore[arg-type]
        copy_facts(y.node, node)
        annotate(y.node, rule=kind, operation=operation_name(node.target))
        y.node._rename(node.name)
        if isinstance(dy, fx.Proxy) and dy.node.name.startswith("t_"):
            dy.node._rename(f"d_{node.name}")
        if derived and dy is not ZERO:
            dy = self._structured(node, dy)
            one = sum(not all_zero((tangent,)) for tangent in tangents) == 1
            if self.fold and kind != "linear" and not (kind == "bilinear" and one):
                self.problems.append(_no_rule(node, "on a weight that moves by a finite step: only method 'delta' can"))
        if self.fold and isinstance(dy, fx.Proxy):
            y, dy = y + dy, ZERO
        self.values[node], self.tangents[node] = y, dy

    def _apply(self, node: fx.Node, tangents: tuple) -> tuple[Any, Any]:
        named: dict = self.tangent(dict(node.kwargs))
        if node.target is operator.getitem and isinstance(tangents[0], tuple):
            return self.copy(node), tangents[0][node.args[1]]  # type: ignore[index]
        found = RULES.get(node.target)  # type: ignore[arg-type]
        if self.fold and found and found.finite:
            return found.finite(tangents, self.value(node.args), self.value(dict(node.kwargs))), ZERO
        if is_opaque(node.target):
            return opaque_tangent(node.target, tangents, self.value(node.args), self.value(dict(node.kwargs)), named)  # type: ignore[arg-type]
        return apply_rule(node.target, tangents, self.value(node.args), self.value(dict(node.kwargs)), named)  # type: ignore[arg-type]

    def _passed(self, tangent: Any, node: fx.Node, derived: bool) -> Any:
        """What a rule gets: of a structured tangent, the response alone where the rows stay apart, else all of it."""
        if not isinstance(tangent, Scaled):
            return tangent
        if derived:
            return tangent.response
        place = self.batch_axes.get(node.name, BATCH_FIRST)
        if place is None:
            return replace(tangent, scale=for_all_examples(tangent.scale, 1, f"module '{module_path(node)}'"))
        return replace(tangent, batch_axis=place)

    def _structured(self, node: fx.Node, response: Any) -> Scaled:
        """The tangent of a parameter, or of a value computed from it row by row."""
        scales: Any = info_of(node).scales
        scale: Any = self.named[scales.name]
        return Scaled(pick_rows(scale, scales.runs) if scales.runs else scale, response, scales.axis)

    def run(self, finish: Callable[[_Pushforward, Any], Any]) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            if node.op != "output":
                self.visit(node)
                continue
            self.emitter.source = node
            result = finish(self, node)
            if self.problems:
                raise TransformError(self.problems)
            output = self.graph.output(map_aggregate(result, lambda v: v.node if isinstance(v, fx.Proxy) else v))
            copy_facts(output, node)
        return assemble(self.module, self.graph)


def _no_rule(node: fx.Node, reason: str) -> Diagnostic:
    return Diagnostic(
        module_path(node),
        f"{operation_name(node.target)} has no tangent rule ({reason})",
        source_of(node),
        "register one (CONTRIBUTING.md, 'add a rule'), or freeze the parameters it depends on",
    )


def pushforward(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph f(x, delta) → graph (y, dy) with dy = J_yw Θ delta, in the model's own output structure.

    dy is real zeros where nothing depends on the weights, None for leaves that are not float. Raises TransformError
    listing every operation that a tangent reaches and that has neither a rule nor a derivative in torch.
    """

    def pair(walk: _Pushforward, output: fx.Node) -> Any:
        def real(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return None
            dy = walk.tangents[leaf]
            return zeros_tangent(walk.values[leaf]) if dy is ZERO else dy

        return walk.value(output.args[0]), map_aggregate(output.args[0], real)

    return _Pushforward(module, plan.batch_axes, fold=False).run(pair)


def linearized(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph → graph of the linearised output y + dy (paper, Eq. 3.13).

    An output that ends in softmax, log-softmax or
    sigmoid is linearised before it: link(z + dz). Otherwise the loss of y + dy has no lower bound.
    """

    def add(walk: _Pushforward, output: fx.Node) -> Any:
        def leaf_sum(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            dy = walk.tangents[leaf]
            if dy is ZERO:
                return walk.values[leaf]
            link: Any = leaf
            views: list[Any] = []
            while link.op == "call_function" and link.target in VIEWS and isinstance(link.args[0], fx.Node):
                views.append(link)
                link = link.args[0]
            if link.op == "call_function" and link.target in LINKS:
                z: Any = link.args[0]
                result = walk.values[z] + walk.tangents[z]
                for node in (link, *reversed(views)):
                    result = call(node.target, result, *walk.value(node.args[1:]), **walk.value(dict(node.kwargs)))
                return result
            return walk.values[leaf] + dy

        return map_aggregate(output.args[0], leaf_sum)

    return _Pushforward(module, plan.batch_axes, fold=False).run(add)


def perturbed(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """hyperized graph → graph of f(x; w₀ + Θ delta), not linearised: each hyperlayer's tangent is added on the spot.

    The forward of the methods "stn" and "centered". Exact, because hyperlayers are linear in their parameters.
    """
    return _Pushforward(module, plan.batch_axes, fold=True).run(lambda walk, output: walk.value(output.args[0]))
