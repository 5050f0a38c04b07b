"""The pass canonicalize: methods, operators, in-place variants and leaf modules become one spelling per operation.

Everything after this pass sees call_function nodes only, never mutated values, and the vocabulary of `fxstn.rules`.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Argument, Target
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.ir.errors import Diagnostic, TransformError, module_path, operation_name, source_of
from fxstn.ir.facts import result_names
from fxstn.ir.graphs import copied, map_leaves, rename
from fxstn.ir.node_info import annotate, copy_facts, copy_place, info_of
from fxstn.ir.spelling import IN_PLACE_OPERATORS, Spelled, Unspellable, respell
from fxstn.ir.vocabulary import DROPOUTS, dropout_settings, is_size
from fxstn.ops.noise import track_batch
from fxstn.ops.synced import synced_batch_norm
from fxstn.passes.in_place import Parts, functionalize


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """One spelling per operation, and no mutation.

    Raises TransformError that lists every mutation which values cannot express.
    """
    module = copied(module)
    problems: list[Diagnostic] = []
    for node in list(module.graph.nodes):
        _decompose(node)
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            _expand_batch_norm(module, node)
        elif node.op in ("call_method", "call_function"):
            try:
                _respell(node)
            except Unspellable as mutation:
                remedy = "write it without changing a tensor in place"
                problems.append(Diagnostic(module_path(node), mutation.reason, source_of(node), remedy))
    _count_batches(module)
    parts: Parts = {}
    for node in list(module.graph.nodes):
        if (position := info_of(node).mutates) is not None:
            annotate(node, mutates=None)
            problems.extend(functionalize(node, position, parts))
    if problems:
        raise TransformError(problems)
    for node in list(module.graph.nodes):
        _simplify_structure(node)
    for node in module.graph.nodes:
        if (exits := info_of(node).exits) and node.op == "call_function":
            rename(node, exits[0].path.replace(".", "_") or node.name)
    module.graph.lint()
    return module


class _Inliner(fx.proxy.GraphAppendingTracer):
    """Gives the nodes of a decomposition the place of the node that it stands for."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.graph)
        self.source = node

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        copy_place(node, self.source)
        return node


def _decompose(node: fx.Node) -> None:
    """Writes a function that has a decomposition as what it computes. Each of several results is read by its number."""
    if node.op != "call_function" or is_size(node):
        return
    try:
        spelled = respell(node.target, node.args, node.kwargs)
    except Unspellable:  # `_respell` reports it later
        return
    if spelled.function not in DECOMPOSITIONS:
        return
    inliner = _Inliner(node)
    with node.graph.inserting_before(node):
        args, kwargs = map_leaves(
            (spelled.args, spelled.kwargs), lambda leaf: fx.Proxy(leaf, inliner) if isinstance(leaf, fx.Node) else leaf
        )
        results = DECOMPOSITIONS[spelled.function](*args, **kwargs)
    if results is NotImplemented:
        return
    single = isinstance(results, fx.Proxy)
    for user in [node] if single else list(node.users):
        result = results if single else results[user.args[1]]
        user.replace_all_uses_with(result.node)
        annotate(result.node, exits=info_of(user).exits or info_of(result.node).exits)
        node.graph.erase_node(user)
    if not single:
        node.graph.erase_node(node)


def _expand_batch_norm(module: fx.GraphModule, node: fx.Node) -> None:
    """A batch norm module becomes the function, with its parameters and statistics as nodes."""
    graph, path = module.graph, str(node.target)
    norm = module.get_submodule(path)
    assert isinstance(norm, _BatchNorm), path
    training = bool(info_of(node).training)
    tracked = norm.running_mean is not None and (norm.track_running_stats or not training)

    def attribute(name: str) -> fx.Node | None:
        if getattr(norm, name) is None:
            return None
        label = f"{path.removeprefix('model.')}.{name}".replace(".", "_")
        result = graph.create_node("get_attr", f"{path}.{name}", name=label)
        copy_place(result, node)
        return result

    with graph.inserting_before(node):
        momentum: float | fx.Node = 0.0 if norm.momentum is None else norm.momentum
        if training and tracked and norm.num_batches_tracked is not None:
            momentum = graph.call_function(track_batch, (attribute("num_batches_tracked"), norm.momentum))
        statistics = [attribute(name) if tracked else None for name in ("running_mean", "running_var")]
        tensors = [*statistics, attribute("weight"), attribute("bias")]
    synced = isinstance(norm, nn.SyncBatchNorm) and (training or tracked)
    node.op, node.target = "call_function", synced_batch_norm if synced else F.batch_norm
    node.args, node.kwargs = (node.args[0], *tensors, training or not tracked, momentum, norm.eps), {}


def _count_batches(module: fx.GraphModule) -> None:
    """A batch norm's counter, added to in place before it normalises, becomes the `track_batch` of its momentum."""
    counts: dict[str, list[fx.Node]] = {}
    for node in list(module.graph.nodes):
        if _adds_one(node) and all(map(_adds_one, node.users)) and (owner := _owner(node.args[0])):
            counts.setdefault(owner, []).append(node)
        elif node.target is F.batch_norm and node.args[5] and counts.get(owner := _owner(node.args[1])):
            count, norm = counts[owner].pop(0), module.get_submodule(owner)
            counter = count.all_input_nodes[0]
            momentum = norm.momentum if isinstance(norm, _BatchNorm) else node.args[6]
            with module.graph.inserting_before(node):
                tracked = module.graph.call_function(track_batch, (counter, momentum))
            node.args = (*node.args[:6], tracked, node.args[7])
            count.replace_all_uses_with(counter)
            module.graph.erase_node(count)


def _adds_one(node: fx.Node) -> bool:
    return bool(info_of(node).mutates is not None and node.target is operator.add and node.args[1] == 1)


def _owner(value: Argument) -> str:
    """Path of the module that an attribute read by a node belongs to; "" for any other value."""
    return str(value.target).rpartition(".")[0] if isinstance(value, fx.Node) and value.op == "get_attr" else ""


def _respell(node: fx.Node) -> None:
    """Gives a node its canonical function and arguments. Raises Unspellable."""
    if node.op == "call_function" and is_size(node):
        node.target = IN_PLACE_OPERATORS.get(node.target, node.target)
        return
    spelled = respell(node.target, node.args, node.kwargs)

    def emit(value: object) -> object:
        """What an operation is made of becomes nodes of its own before it."""
        if not isinstance(value, Spelled):
            return value
        new = node.graph.call_function(value.function, *map_leaves((value.args, value.kwargs), emit))
        copy_place(new, node)
        return new

    with node.graph.inserting_before(node):
        args, kwargs = map_leaves((spelled.args, spelled.kwargs), emit)
    if spelled.in_place:
        mutated = node.args[0] if node.args else node.all_input_nodes[0]
        if mutated not in args:
            raise Unspellable(f"{operation_name(node.target)} changes a tensor in place")
        annotate(node, mutates=args.index(mutated))
    node.op, node.target, node.args, node.kwargs = "call_function", spelled.function, args, kwargs


def _simplify_structure(node: fx.Node) -> None:
    """Drops dropout in eval mode, and numbers named results."""
    if node.op != "call_function":
        return
    if node.target is getattr and (position := _result_position(*node.args)) is not None:
        node.target, node.args = operator.getitem, (node.args[0], position)
    elif node.target in DROPOUTS:
        p, training = dropout_settings(node)
        if training:
            node.args, node.kwargs = (node.args[0], p, True), {}
        else:
            _bypass(node)


def _result_position(source: Argument, name: Argument) -> int | None:
    """The number of one of an operation's named results, such as `values` of torch.topk; None for anything else."""
    if not isinstance(source, fx.Node) or source.op != "call_function" or not isinstance(name, str):
        return None
    return result_names(source.target).get(name)


def _bypass(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(torch.clone, (node.args[0],))
    copy_facts(copy, node)
    annotate(copy, handed_through=True)
    node.replace_all_uses_with(copy)
    node.graph.erase_node(node)


def drop_handed_through(module: fx.GraphModule) -> fx.GraphModule:
    """Removes the copies that only kept a module's output apart from its input (fxstn.passes.condition may need them)."""
    module = copied(module)
    for node in list(module.graph.nodes):
        if info_of(node).handed_through:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
    return module
