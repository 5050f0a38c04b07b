"""Which operations read parameters, or what is computed from them, in which role, and which axes a scale can be along."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx
from torch.fx.node import Argument

from fxstn.ir.graphs import function_of, map_leaves, model_of
from fxstn.ir.tangents import WHOLE
from fxstn.ir.vocabulary import is_size
from fxstn.passes.row_structure import Part, Structure, structure_of
from fxstn.rules import RULES
from fxstn.rules.operand_axes import Path, axis_use
from fxstn.rules.registry import ParameterRole

NORM_ROLES = ("gain", "shift")


@dataclass(frozen=True)
class ParameterUse:
    """One operation that reads what is computed from a parameter whose tangent is scaled along one axis.

    parameter: its name.
    axis: of the parameter, or WHOLE.
    node: the operation.
    role: how it reads the parameter; None where no scale passes through.
    fan_in: of a layer.
    summed: whether the operation sums along the axis, so that its other operand is scaled in place of its result.
    """

    parameter: str
    axis: int
    node: fx.Node
    role: str | None = None
    fan_in: int = 1
    summed: bool = False


def uses_of(
    module: fx.GraphModule, axes: Mapping[str, Sequence[int]], layers_only: bool = False
) -> tuple[list[ParameterUse], Structure]:
    """Every use of some parameters in a canonical graph, and what the graph computes from parameters alone.

    axes: {name of a parameter: the axes to try}.
    layers_only: whether other operations than layers and norms let no scale pass through.
    """
    structure = structure_of(module, axes)
    result = [ParameterUse(name, axis, node) for (name, axis), node in structure.lost.items()]
    for node, parts in structure.parts.items():
        for user in node.users:
            if user in structure.parts or is_size(user) or user in structure.constants:
                continue
            for path, _ in paths_of(node, user):
                own = None if layers_only and role_at(user, path, structure.ranks[node]) is None else path
                result += [_use_of(module, structure, node, part, user, own) for part in parts]
    return result, structure


def paths_of(node: fx.Node, user: fx.Node) -> Iterator[tuple[Path | None, Argument]]:
    """Where an operation reads a value: its argument's position, and that in a list; None for any other place."""
    for i, argument in enumerate(user.args):
        if argument is node:
            yield (i,), argument
        elif isinstance(argument, (tuple, list)) and user.op == "call_function":
            for j, entry in enumerate(argument):
                if entry is node:
                    yield (i, j), entry
                elif node in _nodes_in(entry):
                    yield None, entry
        elif node in _nodes_in(argument):
            yield None, argument
    if node in _nodes_in(tuple(user.kwargs.values())):
        yield None, None


def _nodes_in(structure: object) -> list[fx.Node]:
    result: list[fx.Node] = []
    map_leaves(structure, lambda leaf: result.append(leaf) if isinstance(leaf, fx.Node) else None)
    return result


def _use_of(
    module: fx.GraphModule, structure: Structure, node: fx.Node, part: Part, user: fx.Node, path: Path | None
) -> ParameterUse:
    none = ParameterUse(part.parameter, part.of, user)
    if path is None or user.op != "call_function" or part.element is not None:
        return none
    parameter = model_of(module).get_parameter(part.parameter)
    if part.of == WHOLE:
        reads = role_at(user, path, structure.ranks[node])
        fan_in = parameter.numel() // len(parameter) if parameter.dim() > 1 else 1
        if user.target not in RULES:
            return none
        return replace(none, role=reads.role if reads else "term", fan_in=max(1, fan_in))
    rows, rank = max(1, parameter.shape[part.of]), structure.ranks[node]
    if (reads := role_at(user, path, rank)) is not None:
        if part.axis not in reads.axes:
            return none
        fan_in = 1 if reads.role != "weight" else parameter.numel() // rows
        if reads.role == "bias":
            weight, own = user.args[path[0] - 1], parameter
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                own = operator.attrgetter(str(weight.target))(module)
            fan_in = own.numel() // max(1, own.shape[0])
        return replace(none, role=reads.role, fan_in=max(1, fan_in), summed=reads.axes.index(part.axis) > 0)
    if (use := axis_use(function_of(user), user.args, path, part.axis, rank)) is not None:
        fan_in = max(1, parameter.numel() // rows) if use.role == "weight" else 1
        return replace(none, role=use.role, fan_in=fan_in, summed=use.partner is not None)
    return replace(none, role="term", summed=True) if user in structure.shared else none


def role_at(user: fx.Node, path: Path | None, rank: int) -> ParameterRole | None:
    """How a layer or a norm reads the parameter at a path, of which the rank is known; a vector is no matrix."""
    rule = RULES.get(function_of(user)) if user.op == "call_function" else None
    reads = None if rule is None or path is None or len(path) > 1 else rule.reads.get(path[0])
    return None if reads is None or (reads.role in ("weight", "table") and rank < 2) else reads


def layer_weights(module: fx.GraphModule, role: Literal["weight", "table"] = "weight") -> list[str]:
    """Names of the parameters that are (part of) the weight of a layer, or the table of an embedding, in execution order."""
    model = model_of(module)
    axes = {name: range(p.dim()) for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    uses, _ = uses_of(module, axes)
    weights = {use.parameter for use in uses if use.role == role}
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    executed = [str(node.target).removeprefix("model.") for node in module.graph.nodes if node.op == "get_attr"]
    first = {name: i for i, name in reversed(list(enumerate(executed)))}
    return sorted(weights, key=lambda name: (first.get(name, len(first)), order[name]))
