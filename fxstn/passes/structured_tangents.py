"""Structured tangents in a walk of pushforward: of values computed from parameters alone, and where an operation reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxstn.ir.errors import module_path
from fxstn.ir.graphs import filled_in, function_of, map_leaves
from fxstn.ir.node_info import RowScales, info_of
from fxstn.ir.staging import draws
from fxstn.ir.tangents import (
    BATCH_FIRST,
    SHARED,
    WHOLE,
    ZERO,
    BatchAxes,
    BatchAxis,
    Place,
    Scaled,
    ScaledParts,
    all_zero,
)
from fxstn.ir.vocabulary import is_size
from fxstn.ops.response import (
    add_scaled,
    for_all_examples,
    mean_over_examples,
    pick_rows,
    scale_beside,
    scale_channels,
)
from fxstn.passes.by_example import obstacle
from fxstn.passes.parameter_uses import role_at
from fxstn.rules import RULES
from fxstn.rules.operand_axes import AxisUse, Path, axis_use

EVERYWHERE = AxisUse("term", 0)  # of a single scale
Extra = tuple[Path, Scaled, AxisUse | None]  # a part of an operand's tangent that a rule does not take with all others


class StructuredTangents:
    """What a walk over a graph does with parameters that respond.

    values, tangents: {node: its value and its tangent in the new graph}.
    by_name: {name of a copied node: its value}.
    batch_axes: where the examples are in each value of the graph.
    """

    values: dict[fx.Node, fx.Proxy]
    tangents: dict[fx.Node, object]
    by_name: dict[str, fx.Proxy]
    batch_axes: BatchAxes
    copy: Callable[[fx.Node], fx.Proxy]

    def apply(self, node: fx.Node, tangents: tuple, named: dict, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        """(y, dy) of a node by its rule. Raises NoRule."""
        raise NotImplementedError

    def part(self, scales: RowScales, response: object) -> Scaled:
        """One part of the tangent of a parameter, or of a value computed from it."""
        scale: Any = self.by_name[scales.name]
        scale = pick_rows(scale, scales.runs) if scales.runs else scale
        return Scaled(scale, response, scales.axis, rank=scales.rank)

    def derived(self, node: fx.Node) -> tuple[Any, ScaledParts]:
        """(y, its tangent) of a value computed from parameters alone: each part by the derivative of its operation."""
        y: Any = None
        parts: list[Scaled | None] = []
        results: dict[tuple, Any] = {}
        for scales in info_of(node).scales:
            if scales.origins not in results:
                results[scales.origins] = ZERO
                args, named = self._origins(node.args, scales), self._origins(node.kwargs, scales)
                if not all_zero((args, named)):
                    own, dy = self.apply(node, args, named, self.values)
                    y, results[scales.origins] = own if y is None else y, _reused(own, dy)
            dy = results[scales.origins]
            parts.append(None if dy is ZERO else self.part(scales, dy))
        return self.copy(node) if y is None else y, ScaledParts(tuple(parts))

    def _origins(self, structure: object, scales: RowScales) -> Any:
        """What a part is computed from: of each operand's tangent the responses of the parts that it comes from."""

        def of_leaf(leaf: object) -> object:
            tangent = self.tangents[leaf] if isinstance(leaf, fx.Node) else ZERO
            if not isinstance(tangent, ScaledParts):
                return ZERO
            numbers = [number for name, number in scales.origins if isinstance(leaf, fx.Node) and name == leaf.name]
            parts = [part for number in numbers if (part := tangent.parts[number]) is not None]
            return sum((part.response for part in parts[1:]), parts[0].response) if parts else ZERO

        if isinstance(structure, tuple):
            return tuple(ZERO if isinstance(entry, slice) else map_leaves(entry, of_leaf) for entry in structure)
        return map_leaves(structure, of_leaf)

    def read(self, node: fx.Node, tangents: tuple, named: dict) -> tuple[Any, Any, bool]:
        """(y, dy, whether it reads a parameter that responds) of an operation that reads other values, too."""
        extras: list[Extra] = []
        main = tuple(self._for_rule(node, (i,), tangent, extras) for i, tangent in enumerate(tangents))
        named = map_leaves(named, self.dense)
        reads = bool(extras) or any(isinstance(tangent, Scaled) for tangent in main)
        y, dy = (self.copy(node), ZERO) if all_zero((main, named)) else self.apply(node, main, named, self.values)
        for path, part, use in extras:
            dy = self._with_part(node, dy, path, part, use)
        return y, dy, reads

    def _for_rule(self, node: fx.Node, path: Path, tangent: object, extras: list[Extra]) -> Any:
        """What a rule gets of the tangent of one operand; parts that it does not take with all others go to `extras`.

        A rule that takes no structured tangent gets the product, by one perturbation for the whole batch.
        """
        if isinstance(tangent, (tuple, list)) and len(path) == 1:
            return type(tangent)(self._for_rule(node, (*path, i), entry, extras) for i, entry in enumerate(tangent))
        if not isinstance(tangent, ScaledParts):
            return map_leaves(tangent, self.dense)
        result: Any = ZERO
        for part in filter(None, tangent.parts):
            if part.axis == WHOLE:
                extras.append((path, part, EVERYWHERE))
                continue
            reads = role_at(node, path, part.rank)
            if reads is not None and part.axis in reads.axes:
                own = self._placed(part, self.batch_axes.get(node.name, BATCH_FIRST), node)
                if result is ZERO:
                    result = own
                else:
                    extras.append((path, own, None))
            elif use := axis_use(function_of(node), node.args, path, part.axis, part.rank):
                extras.append((path, part, use))
            else:
                dense = self.dense(ScaledParts((self._placed(part, None, node),)))
                result = dense if result is ZERO else result + dense
        return result

    def dense(self, tangent: object) -> Any:
        """The tangent of a value as a tensor, by the mean of the scales over the examples."""
        if not isinstance(tangent, ScaledParts):
            return tangent
        terms = [
            scale_channels(part.response, mean_over_examples(part.scale), part.axis)
            for part in tangent.parts
            if part is not None
        ]
        return sum(terms[1:], terms[0]) if terms else ZERO

    def _placed(self, part: Scaled, axis: BatchAxis | None, node: fx.Node) -> Scaled:
        """A part of a tangent for a value in which the examples are along `axis`."""
        if axis is not None and axis != SHARED:
            return replace(part, batch_axis=axis)
        if axis is None and part.axis == WHOLE:  # one number for what examples meet in, such as a temperature
            return replace(part, scale=mean_over_examples(part.scale))
        reason = obstacle(node, self.batch_axes) if axis == SHARED else None
        where = f"module '{module_path(node)}'" + (f", where {reason}" if reason else "")
        return replace(part, scale=for_all_examples(part.scale, 1, where))

    def _with_part(self, node: fx.Node, dy: Any, path: Path, part: Scaled, use: AxisUse | None) -> Any:
        """dy + what one part of an operand's tangent gives."""
        if use is None:
            _, term = self.apply(node, _only(node.args, path, part), {}, self.values)
            return term if dy is ZERO else dy + term
        beside = filled_in(_at(node.args, use.vector), self.values) if use.vector else None
        values = self.values
        if use.partner and isinstance(other := _at(node.args, use.partner), fx.Node):
            if other.op == "get_attr" or info_of(other).scales:  # it has no rows to scale: those of the operand are
                operand = self._placed(part, self.batch_axes.get(_at(node.args, path).name, SHARED), node)
                direct = scale_channels(part.response, operand.scale, part.axis, *_elsewhere(operand))
                _, term = self.apply(node, _only(node.args, path, direct), {}, values)
                return term if dy is ZERO else dy + term
            own = self._placed(part, self.batch_axes.get(other.name, BATCH_FIRST), node)
            values = values | {other: _scaled(values[other], own, use.dim, beside)}
        _, term = self.apply(node, _only(node.args, path, part.response), {}, values)
        if use.partner is None:
            own = self._placed(part, self.batch_axes.get(node.name, BATCH_FIRST), node)
            if dy is not ZERO and beside is None:
                return add_scaled(dy, term, own.scale, use.dim, *_elsewhere(own))
            term = _scaled(term, own, use.dim, beside)
        return term if dy is ZERO else dy + term


def _scaled(value: Any, part: Scaled, dim: int, beside: Any) -> Any:
    """s ⊙ value along one of its dimensions, which is one less from the end beside a vector."""
    if beside is not None:
        return scale_beside(value, part.scale, dim, beside, *_elsewhere(part))
    return scale_channels(value, part.scale, dim, *_elsewhere(part))


def moved_parameters(graph: fx.Graph) -> set[fx.Node]:
    """Parameters that some operation reads in another way than linearly, themselves or what is computed from them.

    A finite step of such a parameter is not y + dy of the operation.
    """
    result: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        sources = [source for source in node.all_input_nodes if info_of(source).scales]
        if sources and ((info_of(node).scales and node in result) or not _is_linear(node, sources)):
            result.update(sources)
    return result


def _is_linear(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether an operation is linear in some of its operands jointly, or reads only their sizes."""
    if is_size(node) or draws(node.target):
        return True
    rule = RULES.get(node.target) if callable(node.target) else None
    if rule is None:
        return False
    if rule.reads:
        return all(node.args[i] not in sources or i in rule.reads for i in range(len(node.args)))
    if rule.kind in ("linear", "additive") or node.target is torch.where:
        return True
    multilinear = rule.kind == "bilinear" or node.target is torch.einsum
    return multilinear and sum(argument in sources for argument in node.args) == 1


def _elsewhere(part: Scaled) -> tuple[Place, ...]:
    """Where the examples are, as a further argument; none in a plain network, so that its graph stays short."""
    return () if part.batch_axis == BATCH_FIRST else (part.batch_axis,)


def _at(args: tuple, path: Path) -> Any:
    for position in path:
        args = args[position]
    return args


def _only(args: tuple, path: Path, tangent: object) -> tuple:
    """The tangents of all arguments where only the one at a path has one."""

    def of(argument: object, rest: Path) -> object:
        if isinstance(argument, (tuple, list)):
            return type(argument)(of(entry, rest[1:] if rest[:1] == (i,) else ()) for i, entry in enumerate(argument))
        return ZERO

    result = [of(argument, path[1:] if path[0] == i else ()) for i, argument in enumerate(args)]
    if len(path) == 1:
        result[path[0]] = tangent
    else:
        result[path[0]] = [tangent if i == path[1] else ZERO for i in range(len(args[path[0]]))]
    return tuple(result)


def _reused(y: Any, dy: Any) -> Any:
    """y in place of dy where both are one operation on the same arguments: a weight that is only scaled is its own response."""
    if not (isinstance(y, fx.Proxy) and isinstance(dy, fx.Proxy)) or y.node is dy.node:
        return dy
    same = y.node.target is dy.node.target and _identical(y.node.args, dy.node.args) and not dy.node.kwargs
    return y if same and not dy.node.users else dy


def _identical(first: object, second: object) -> bool:
    """Whether arguments are the same nodes and equal plain values."""
    if isinstance(first, (tuple, list)):
        same = type(first) is type(second) and len(first) == len(second)  # type: ignore[arg-type]
        return same and all(map(_identical, first, second))  # type: ignore[call-overload]
    return first is second or (type(first) is type(second) and isinstance(first, (int, float, str)) and first == second)
