"""The pass hyperize: trainable parameters of layers gain response parameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.errors import module_path, operation_name
from fxstn.ir.graphs import add_placeholder, copied, function_of, model_of
from fxstn.ir.node_info import RowScales, annotate
from fxstn.ir.vocabulary import DROPOUTS, is_size
from fxstn.ops.precision import wide
from fxstn.ops.response import Response, ResponseTree, responses_in
from fxstn.ops.synced import BATCH_NORMS
from fxstn.passes.row_structure import Derived, consumers, from_parameters, structures
from fxstn.rules import RULES
from fxstn.rules.registry import ParameterRole

NORM_ROLES = ("gain", "shift")
SCALE_KEEPING = {*DROPOUTS, torch.cat, F.avg_pool2d, F.max_pool2d}  # what a channel is multiplied by passes through


@dataclass(frozen=True)
class ParameterUse:
    """One operation that reads values computed from parameters: in a role of a layer or a norm, or otherwise (role None)."""

    parameters: tuple[str, ...]
    role: str | None
    node: fx.Node
    fan_in: int = 1


@dataclass
class Responses:
    """Which parameters respond, and why the others do not.

    axes: {name: axis of its scales}.
    fan_ins: {name: fan-in}.
    leaders: {name: the first of the parameters that share its scales}.
    obstacles: {name of a parameter that does not respond: the reason}.
    """

    axes: dict[str, int] = field(default_factory=dict)
    fan_ins: dict[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def uses_of(module: fx.GraphModule, names: Iterable[str], axis: int) -> list[ParameterUse]:
    """Every use of some parameters in a canonical graph.

    names: of the parameters, whose tangents are scaled along `axis`.
    """
    names = list(names)
    result = []
    reached = from_parameters(module.graph, {f"model.{name}": name for name in names})
    for node, parameters in reached.items():
        for user in consumers(node, reached):
            if _role_of(node, user) is None:
                result.append(ParameterUse(parameters, None, user))
    without_role = {name for use in result for name in use.parameters}
    structure_of = structures(module, [name for name in names if name not in without_role], axis)
    for node, derived in structure_of.items():
        for user in consumers(node, structure_of):
            result.append(
                _use_of(module, node, derived, user if derived.rows else _find_row_mixer(node, structure_of, user))
            )
    return result


def _role_of(node: fx.Node, user: fx.Node) -> tuple[int, ParameterRole] | None:
    """(position, how it is read) where a layer takes the value of `node` as a parameter and in no other way."""
    rule = RULES.get(function_of(user)) if user.op == "call_function" else None
    positions = [i for i, argument in enumerate(user.args) if argument is node]
    if rule is None or len(positions) != 1 or positions[0] not in rule.reads or node in user.kwargs.values():
        return None
    return positions[0], rule.reads[positions[0]]


def _find_row_mixer(node: fx.Node, structure_of: Mapping[fx.Node, Derived], user: fx.Node) -> fx.Node:
    """The first operation on the way from the parameters to `node` that mixed their rows."""
    before = [source for source in node.all_input_nodes if source in structure_of and structure_of[source].rows is None]
    return _find_row_mixer(before[0], structure_of, node) if before else user if node.op == "get_attr" else node


def _use_of(module: fx.GraphModule, node: fx.Node, derived: Derived, user: fx.Node) -> ParameterUse:
    read = _role_of(node, user)
    if read is None or derived.rows is None or derived.rows.axis not in read[1].axes:
        return ParameterUse(derived.parameters, None, user)
    position, reads = read
    parameters = [model_of(module).get_parameter(name) for name in derived.parameters]
    widest = max(p.dim() for p in parameters)
    if reads.role in NORM_ROLES:
        return ParameterUse(derived.parameters, reads.role if widest == 1 else None, user)
    if reads.role == "bias":
        weight = user.args[position - 1]
        own = parameters[0]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            own = operator.attrgetter(str(weight.target))(module)
        return ParameterUse(derived.parameters, "bias", user, own.numel() // max(1, own.shape[0]))
    if widest < 2:
        return ParameterUse(derived.parameters, None, user)  # a vector has no rows to scale
    fan_in = 1 if reads.role == "table" else max(p.numel() // p.shape[derived.rows.axis] for p in parameters)
    return ParameterUse(derived.parameters, reads.role, user, max(1, fan_in))


def layer_weights(module: fx.GraphModule) -> list[str]:
    """Names of the parameters that are (part of) the weight of a layer, in execution order."""
    names = [name for name, parameter in model_of(module).named_parameters() if parameter.requires_grad]
    weight_uses = (use for axis in (0, 1) for use in uses_of(module, names, axis) if use.role == "weight")
    weights = [name for use in weight_uses for name in use.parameters]
    order = {name: i for i, (name, _) in enumerate(model_of(module).named_parameters())}
    executed = [str(node.target).removeprefix("model.") for node in module.graph.nodes if node.op == "get_attr"]
    first = {name: i for i, name in reversed(list(enumerate(executed)))}
    return sorted(set(weights), key=lambda name: (first.get(name, len(first)), order[name]))


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
    keeping = {name for use in trained if not _loses_scale(use.node) for name in use.parameters}
    return {name for use in trained for name in use.parameters} - keeping


def _divides(node: fx.Node) -> bool:
    """Whether an operation normalises each channel by what is in the batch, not by running statistics."""
    by_batch = node.args[5] if len(node.args) > 5 else True  # training, use_input_stats
    return node.target in (*BATCH_NORMS, F.instance_norm) and by_batch is True


def responses(graphs: Sequence[fx.GraphModule], structured: bool) -> Responses:
    """Which parameters respond.

    A parameter needs every operation that reads it, in every graph, to be a layer in which one Δw along one axis is
    possible: all of them must see the same. Rows (axis 0) come first; columns (axis 1) where rows are not possible, and
    where a weight that is only scaled has a single row. Where weights are only scaled, affine parameters of norms respond
    too. Layers before a batch norm, which takes their scale away, then do not.

    graphs: the training graph first.
    structured: whether R is learned; else weights are only scaled.
    """
    parameters = dict(model_of(graphs[0]).named_parameters())
    result = Responses()
    pending = {name for name, parameter in parameters.items() if parameter.requires_grad}
    single = {name for name in pending if parameters[name].dim() == 2 and len(parameters[name]) == 1 and not structured}
    for axis, later in ((0, single), (1, set()), (0, set())):
        candidates = pending - later
        trained, *others = (uses_of(graph, sorted(candidates), axis) for graph in graphs)
        uses = [*trained, *itertools.chain(*others)]
        fan_ins, obstacles = _sort_by_obstacle(uses, set() if structured else _scaleless(trained), structured)
        for name, why in obstacles.items():
            result.obstacles.setdefault(name, why)
        for group in _groups(uses, candidates):
            if all(name in fan_ins and name not in obstacles for name in group):
                for name in group:
                    result.axes[name], result.fan_ins[name], result.leaders[name] = axis, fan_ins[name], group[0]
                pending -= set(group)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            result.obstacles[name] = "frozen (requires_grad=False)"
    result.obstacles = {name: why for name, why in result.obstacles.items() if name not in result.axes}
    order = list(parameters)
    result.axes = dict(sorted(result.axes.items(), key=lambda item: order.index(item[0])))
    return result


def _sort_by_obstacle(
    uses: Sequence[ParameterUse], scaleless: set[str], structured: bool
) -> tuple[dict[str, int], dict[str, str]]:
    """({parameter: fan-in of its first use as a parameter of a layer}, {parameter that cannot respond: why})."""
    fan_ins: dict[str, int] = {}
    obstacles: dict[str, str] = {}
    for use in uses:
        for name in use.parameters:
            if name in scaleless:
                obstacles.setdefault(name, "a batch norm after it takes its scale away")
            elif use.role is None or (structured and use.role in NORM_ROLES):
                why = f"read by {operation_name(use.node.target)} in '{module_path(use.node)}'"
                obstacles.setdefault(name, why)
            else:
                fan_ins.setdefault(name, use.fan_in)
    return fan_ins, obstacles


def _groups(uses: Sequence[ParameterUse], pending: set[str]) -> list[list[str]]:
    """Parameters that meet in one weight, as connected components, each in the order of first use."""
    leader: dict[str, list[str]] = {}
    for use in uses:
        names = [name for name in use.parameters if name in pending]
        merged = list(dict.fromkeys(n for name in names for n in leader.get(name, [name])))
        for name in merged:
            leader[name] = merged
    return list({id(group): group for group in leader.values()}.values())


def response_modules(model: nn.Module, responding: Responses, hyperparameters: int, structured: bool) -> ResponseTree:
    """A module tree that mirrors the model's parameter names: 'layer1.0.conv1.weight' → Response."""
    parameters = {name: model.get_parameter(name) for name in responding.axes}
    blocks: dict[str, int] = {}
    sizes: list[int] = []
    for name, axis in responding.axes.items():
        leader = responding.leaders[name]
        if leader not in blocks:
            blocks[leader] = len(sizes)
            sizes.append(parameters[name].shape[axis])
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
    return tree


def hyperize(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """Add the input `delta` and, beside each parameter with a Response, its scales U δ and its response R.

    Nodes remember what the pushforward pass needs: a parameter the name of R (its own where R is the parameter); it and every
    value computed from it row by row their scales (`fxstn.ir.node_info`).
    """
    module = copied(module)
    graph = module.graph
    responding = dict(response_tree(module))
    delta = add_placeholder(graph, "delta")
    blocks: fx.Node | None = None  # U δ of all
    scales: dict[int, str] = {}
    names: dict[str, str] = {}
    derived: dict[fx.Node, Derived] = {}
    for axis in {response.axis for response in responding.values()}:
        derived |= structures(module, [name for name, r in responding.items() if r.axis == axis], axis)
    for node in list(graph.nodes):
        if node not in derived:
            continue
        name = derived[node].parameters[0]
        block = responding[name].block
        label = name.replace(".", "_")
        with graph.inserting_before(node):
            if blocks is None:
                blocks = graph.create_node("call_module", "response", (delta,), name="scales")
            if block not in scales:
                scale = graph.create_node("call_function", operator.getitem, (blocks, block), name=f"{label}_scale")
                scales[block] = scale.name
            if node.op == "get_attr":
                if responding[name].R is None:
                    names[name] = node.name
                elif name not in names:
                    names[name] = graph.create_node("get_attr", f"response.{name}.R", name=f"{label}_R").name
                annotate(node, response=names[name])
        rows = derived[node].rows
        if rows is not None:
            size = responding[name].U.shape[0]
            runs = () if rows.runs == ((0, size),) else rows.runs
            annotate(node, scales=RowScales(scales[block], rows.axis, runs))
        else:
            annotate(node, scales=RowScales(scales[block], None, ()))
    graph.lint()
    return module


def response_tree(module: fx.GraphModule) -> list[tuple[str, Response]]:
    """(parameter name, its Response) for every parameter that responds."""
    return list(responses_in(module.get_submodule("response")).items())
