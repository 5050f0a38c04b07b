"""The pass hyperize: trainable parameters of layers gain response parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.coverage import NORMED
from fxstn.ir.errors import module_path, operation_name
from fxstn.ir.graphs import add_placeholder, copied, function_of, model_of
from fxstn.ir.node_info import RowScales, annotate
from fxstn.ir.tangents import WHOLE
from fxstn.ir.vocabulary import DROPOUTS, is_size
from fxstn.ops.precision import wide
from fxstn.ops.response import Response, ResponseTree, responses_in
from fxstn.ops.synced import BATCH_NORMS
from fxstn.passes.parameter_uses import NORM_ROLES, ParameterUse, uses_of
from fxstn.passes.row_structure import Part, Structure, structure_of
from fxstn.rules import RULES

SCALE_KEEPING = {*DROPOUTS, torch.cat, F.avg_pool2d, F.max_pool2d}  # what a channel is multiplied by passes through


@dataclass
class Responses:
    """Which parameters respond, and why the others do not.

    axes: {name: axis of its scales}.
    fan_ins: {name: fan-in}.
    leaders: {name: the first of the parameters that share its scales}.
    obstacles: {name of a parameter that does not respond: the reason}.
    padding: {name of a table: its row that gets no gradient}.
    """

    axes: dict[str, int] = field(default_factory=dict)
    fan_ins: dict[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)


def _loses_scale(node: fx.Node) -> bool:
    """Whether the scale of a layer's channels is lost on every way on, because batch norm divides by it.

    The norm's own affine parameters are what can scale these units.
    """
    users = [user for user in node.users if not is_size(user)]
    return bool(users) and all(
        _divides(user) or (user.target in SCALE_KEEPING and _loses_scale(user)) for user in users
    )


def _scaleless(trained: Sequence[ParameterUse]) -> set[str]:
    """Parameters that the training graph reads only where a norm takes the scale away."""
    keeping = {use.parameter for use in trained if not _loses_scale(use.node)}
    return {use.parameter for use in trained} - keeping


def _divides(node: fx.Node) -> bool:
    """Whether an operation normalises each channel by what is in the batch, not by running statistics."""
    by_batch = node.args[5] if len(node.args) > 5 else True  # training, use_input_stats
    return node.target in (*BATCH_NORMS, F.instance_norm) and by_batch is True


def responses(graphs: Sequence[fx.GraphModule], structured: bool, layers_only: bool = False) -> Responses:
    """Which parameters respond, and along which axes.

    A parameter needs an axis that every operation which reads it, in every graph, lets a scale along it pass through: all of
    them must see the same Δw. The axes of a layer's outputs come first. A parameter of which every axis is mixed has one scale
    as a WHOLE. Where weights are only scaled, affine parameters of norms respond too. Layers before a batch norm, which takes
    their scale away, then do not.

    graphs: the training graph first; recordings of a forward that runs as it is, which computes with tangents of any form.
    structured: whether R is learned; else weights are only scaled.
    layers_only: whether only what layers and norms read responds, so that tangents reach no operation before the first layer.
    """
    parameters = dict(model_of(graphs[0]).named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    axes = {name: range(parameter.dim()) for name, parameter in trained.items()}
    of_graphs = [uses_of(graph, axes, layers_only) for graph in graphs]
    result = Responses(obstacles=dict.fromkeys(parameters.keys() - trained.keys(), "frozen (requires_grad=False)"))
    if not structured:
        scaleless = _scaleless([use for use in of_graphs[0][0] if use.role])
        result.obstacles |= dict.fromkeys(scaleless, NORMED)

    def decide(uses: Iterable[ParameterUse], last: bool) -> None:
        """Enter the axis of each parameter; where there is none, and for the last time, the obstacle."""
        for name, by_axis in _by_axis(use for use in uses if use.parameter not in result.obstacles).items():
            stops = [use for own in by_axis.values() for use in own if _stops(use, structured)]
            of_norm = any(use.role for use in stops)
            axis = _best_axis(by_axis, trained[name], structured)
            if axis is None and not (of_norm or layers_only or isinstance(graphs[0], fx.GraphModule)):
                axis = min(by_axis)
            if axis is not None:
                result.axes[name], result.fan_ins[name] = axis, next(use.fan_in for use in by_axis[axis])
            elif last or of_norm:
                node = stops[0].node
                result.obstacles[name] = f"read by {operation_name(node.target)} in '{module_path(node)}'"

    decide((use for own, _ in of_graphs for use in own), layers_only)
    rest = {name: (WHOLE,) for name in trained if name not in result.axes and name not in result.obstacles}
    if rest and not layers_only:
        decide((use for graph in graphs for use in uses_of(graph, rest)[0]), True)
    result.axes = {name: result.axes[name] for name in parameters if name in result.axes}
    sizes = {name: 1 if axis == WHOLE else parameters[name].shape[axis] for name, axis in result.axes.items()}
    result.leaders = _leaders([structure for _, structure in of_graphs], result.axes, sizes)
    rows = {use.parameter: _padding_row(use.node) for own, _ in of_graphs for use in own if use.role == "table"}
    result.padding = {name: row for name, row in rows.items() if row is not None and name in result.axes}
    return result


def _padding_row(lookup: fx.Node) -> int | None:
    """The row of a table that a lookup leaves without a gradient."""
    signature = RULES[function_of(lookup)].signature
    if signature is None or "padding_idx" not in signature.parameters:  # an index, a choice of rows
        return None
    row = signature.bind(*lookup.args, **lookup.kwargs).arguments.get("padding_idx")
    return row if isinstance(row, int) else None


def _by_axis(uses: Iterable[ParameterUse]) -> dict[str, dict[int, list[ParameterUse]]]:
    """{parameter: {axis: its uses}}."""
    result: dict[str, dict[int, list[ParameterUse]]] = {}
    for use in uses:
        result.setdefault(use.parameter, {}).setdefault(use.axis, []).append(use)
    return result


def _best_axis(by_axis: Mapping[int, Sequence[ParameterUse]], parameter: Tensor, structured: bool) -> int | None:
    """The axis of a parameter to scale it along, if there is one: a layer's outputs before its inputs."""

    def cost(axis: int) -> tuple:
        uses = by_axis[axis]
        layer = any(use.role not in ("factor", "term") for use in uses)
        single = axis != WHOLE and parameter.shape[axis] == 1 and not (structured and layer)
        return single, any(use.summed for use in uses), axis if layer else -axis

    possible = [axis for axis, uses in by_axis.items() if not any(_stops(use, structured) for use in uses)]
    return min(possible, key=cost, default=None)


def _stops(use: ParameterUse, structured: bool) -> bool:
    return use.role is None or _is_of_norm(use, structured)


def _is_of_norm(use: ParameterUse, structured: bool) -> bool:
    """Whether a use is the affine part of a norm, which responds only where weights are scaled."""
    return structured and use.role in NORM_ROLES


def _leaders(structures: Sequence[Structure], axes: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, str]:
    """{parameter: the first of those that share its scales}: they meet in one value, along one axis, row by row.

    sizes: of the parameters along their axes.
    """
    groups: dict[str, list[str]] = {name: [name] for name in axes}
    for structure in structures:
        for parts in structure.parts.values():
            places: dict[tuple, str] = {}
            for part in (part for part in parts if axes.get(part.parameter) == part.of):
                name = part.parameter
                other = places.setdefault((sizes[name], *part.place), name)
                if groups[other] is not groups[name]:
                    merged = [*groups[other], *groups[name]]
                    groups |= dict.fromkeys(merged, merged)
    return {name: group[0] for name, group in groups.items()}


def response_modules(model: nn.Module, responding: Responses, hyperparameters: int, structured: bool) -> ResponseTree:
    """A module tree that mirrors the model's parameter names: 'layer1.0.conv1.weight' → Response."""
    parameters = {name: model.get_parameter(name) for name in responding.axes}
    blocks: dict[str, int] = {}
    sizes: list[int] = []
    for name, axis in responding.axes.items():
        leader = responding.leaders[name]
        if leader not in blocks:
            blocks[leader] = len(sizes)
            sizes.append(1 if axis == WHOLE else parameters[name].shape[axis])
    types = [wide(parameter.dtype.to_real()) for parameter in parameters.values()]
    widest, device = max(types, key=lambda dtype: dtype.itemsize), next(iter(parameters.values())).device
    tree = ResponseTree(torch.zeros(sum(sizes), hyperparameters, dtype=widest, device=device), sizes)
    for name, axis in responding.axes.items():
        *path, leaf = name.split(".")
        owner: nn.Module = tree
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        block = blocks[responding.leaders[name]]
        response = Response(parameters[name], responding.fan_ins[name], tree, block, axis, structured)
        owner.add_module(leaf, response)
    for name, response in tree.flat_responses:
        if name in responding.padding and response.R is not None:  # torch trains neither this row nor, by its rule, R's
            nn.init.zeros_(response.R.detach()[responding.padding[name]])
    return tree


def hyperize(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Add the input `delta` and, beside each parameter with a Response, its scales U δ and its response R.

    Nodes remember what the pushforward pass needs: a parameter the name of R (its own where R is the parameter); it and every
    value computed from it that keeps its axis their scales (`fxstn.ir.node_info`).
    """
    module = copied(module)
    graph = module.graph
    responding = dict(response_tree(module))
    delta = add_placeholder(graph, "delta")
    structure = structure_of(module, {name: (response.axis,) for name, response in responding.items()})
    blocks: fx.Node | None = None  # U δ of all
    scales: dict[int, str] = {}
    names: dict[str, str] = {}
    numbers: dict[fx.Node, dict[Part, int]] = {}
    for node in list(graph.nodes):
        if not (parts := structure.parts.get(node)):
            continue
        with graph.inserting_before(node):
            for name in dict.fromkeys(part.parameter for part in parts):
                if blocks is None:
                    blocks = graph.create_node("call_module", "response", (delta,), name="scales")
                if (block := responding[name].block) not in scales:
                    label = f"{name.replace('.', '_')}_scale"
                    scale = graph.create_node("call_function", operator.getitem, (blocks, block), name=label)
                    scales[block] = scale.name
            if node.op == "get_attr":
                (part,) = parts
                name = part.parameter
                if responding[name].R is None:
                    names[name] = node.name
                elif name not in names:
                    label = f"{name.replace('.', '_')}_R"
                    names[name] = graph.create_node("get_attr", f"response.{name}.R", name=label).name
                annotate(node, response=names[name])
        numbers[node], own = _numbered(parts, responding, scales, structure.ranks[node], numbers)
        annotate(node, scales=own)
    graph.lint()
    return module


def _numbered(
    parts: Sequence[Part],
    responding: Mapping[str, Response],
    scales: Mapping[int, str],
    rank: int,
    numbers: Mapping[fx.Node, Mapping[Part, int]],
) -> tuple[dict[Part, int], tuple[RowScales, ...]]:
    """({part: its number}, the scales of each number) of a value: parts of one place and one block of scales are one.

    scales: {block: name of the node that computes its scales}.
    rank: of the value.
    numbers: of the values before.
    """
    joined: dict[tuple, RowScales] = {}
    places: dict[Part, tuple] = {}
    for part in parts:
        response = responding[part.parameter]
        whole = part.runs == ((0, response.U.shape[0]),)
        key = places[part] = (response.block, *part.place)
        own = tuple((source.name, numbers[source][before]) for source, before in part.origins)
        before = joined.get(key, RowScales(scales[response.block], part.axis, () if whole else part.runs, rank))
        joined[key] = before._replace(origins=tuple(dict.fromkeys((*before.origins, *own))))
    order = {key: number for number, key in enumerate(joined)}
    return {part: order[key] for part, key in places.items()}, tuple(joined.values())


def response_tree(module: fx.GraphModule) -> list[tuple[str, Response]]:
    """(parameter name, its Response) for every parameter that responds."""
    return list(responses_in(module.get_submodule("response")).items())
