"""Pass 2, canonicalize: methods, operators, in-place variants and leaf modules become one spelling per operation.

Everything after this pass sees call_function nodes only, never mutated values, and the vocabulary of `fxstn.rules`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxstn.errors import Problem, TransformError, module_path, operation_name, source_of
from fxstn.graphs import copied, rename
from fxstn.layers.noise import track_batch
from fxstn.mutation import DROPOUTS, SIZES, by_value, dropout_settings, is_size

# Spellings that differ in more than their namespace; everything else is found by name.
SPELLINGS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([operator.iadd, torch.add, "add"], operator.add),
    **dict.fromkeys([operator.isub, torch.sub, torch.subtract, "sub", "subtract"], operator.sub),
    **dict.fromkeys([operator.imul, torch.mul, torch.multiply, "mul", "multiply"], operator.mul),
    **dict.fromkeys([operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "divide"], operator.truediv),
    **dict.fromkeys([operator.ipow, torch.pow, "pow"], operator.pow),
    **dict.fromkeys([operator.imatmul, torch.matmul, "matmul"], operator.matmul),
    operator.ifloordiv: operator.floordiv,
    **dict.fromkeys([operator.mod, operator.imod], torch.remainder),
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    **dict.fromkeys([torch.neg, torch.negative, "neg", "negative"], operator.neg),
    **dict.fromkeys([torch.relu, "relu"], F.relu),
    **dict.fromkeys([F.sigmoid, torch.special.expit], torch.sigmoid),
    **dict.fromkeys([F.tanh], torch.tanh),
    **dict.fromkeys([F.softmax, torch.special.softmax], torch.softmax),
    **dict.fromkeys([F.log_softmax, torch.special.log_softmax], torch.log_softmax),
    **dict.fromkeys([torch.selu, "selu"], F.selu),
    **dict.fromkeys([torch.celu, "celu"], F.celu),
    **dict.fromkeys([torch.threshold], F.threshold),
    **dict.fromkeys([torch.clip, "clip"], torch.clamp),
    **dict.fromkeys([torch.absolute, "absolute"], torch.abs),
    **dict.fromkeys([torch.concat, torch.concatenate], torch.cat),
    **dict.fromkeys([torch.adaptive_avg_pool1d], F.adaptive_avg_pool1d),
    **dict.fromkeys([torch.dropout], F.dropout),
    **dict.fromkeys([torch.swapdims, "swapdims"], torch.swapaxes),
}
_PACKED = {torch.reshape, torch.permute, torch.flip, torch.tile}  # as methods they take sizes as separate arguments
_LAYER_ARGUMENTS = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM_ARGUMENTS = {"input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None,
                   "training": False, "momentum": 0.1, "eps": 1e-5}  # fmt: skip
_LAYERS = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}
_INPUT_NAMES = ("input", "self", "tensors", "x")


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """One spelling per operation. Raises TransformError that lists every mutation it cannot express by values."""
    module = copied(module)
    problems: list[Problem] = []
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            _expand_batch_norm(module, node)
        elif node.op in ("call_method", "call_function"):
            problem = _respell(node)
            if problem:
                remedy = "write it without changing a tensor in place"
                problems.append(Problem(module_path(node), problem, source_of(node), remedy))
    for node in list(module.graph.nodes):
        if node.meta.pop("inplace", False):
            problems.extend(by_value(node))
    if problems:
        raise TransformError(problems)
    for node in list(module.graph.nodes):
        _simplify_structure(node)
    for node in module.graph.nodes:
        if node.meta.get("exits") and node.op == "call_function":
            rename(node, node.meta["exits"][0][1].replace(".", "_") or node.name)
    module.graph.lint()
    module.recompile()
    return module


def _expand_batch_norm(module: fx.GraphModule, node: fx.Node) -> None:
    graph, path = module.graph, str(node.target)
    norm: Any = module.get_submodule(path)
    tracked = norm.running_mean is not None
    training = node.meta["training"] or not tracked

    def attribute(name: str) -> fx.Node | None:
        if getattr(norm, name) is None:
            return None
        label = f"{path.removeprefix('model.')}.{name}".replace(".", "_")
        result = graph.create_node("get_attr", f"{path}.{name}", name=label)
        result.meta["scope"] = node.meta["scope"]
        return result

    with graph.inserting_before(node):
        momentum: Any = 0.0 if norm.momentum is None else norm.momentum
        if node.meta["training"] and tracked and norm.num_batches_tracked is not None:
            momentum = graph.call_function(track_batch, (attribute("num_batches_tracked"), norm.momentum))
        names = ("running_mean", "running_var", "weight", "bias")
        arguments = (node.args[0], *(attribute(name) for name in names), training, momentum, norm.eps)
    node.op, node.target, node.args, node.kwargs = "call_function", F.batch_norm, arguments, {}


def _lookup(target: Any) -> tuple[Any, bool]:
    """(canonical function, whether the spelling works in place); (None, True) for a mutation without a counterpart."""
    if target in SPELLINGS:
        in_place = getattr(target, "__module__", "") == "_operator" and target.__name__.startswith("i")
        return SPELLINGS[target], in_place
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target is operator.setitem:
        return None, True
    if name.endswith("_") and not name.endswith("__"):
        base = name[:-1]
        if base in ("normal", "random"):  # torch.normal(x) takes x as a mean
            return None, True
        if base in SPELLINGS:
            return SPELLINGS[base], True
        for namespace in (torch, F, torch.Tensor):
            if hasattr(namespace, base):
                found = getattr(namespace, base)
                return SPELLINGS.get(found, found), True
        return None, True
    if isinstance(target, str):
        found = getattr(torch, name, None)
        if name in SIZES or not inspect.isroutine(found):  # torch.float is a dtype, Tensor.float a conversion
            found = getattr(torch.Tensor, name)
        return SPELLINGS.get(found, found), False
    return target, False


def _respell(node: fx.Node) -> str | None:
    """Give a node its canonical function and arguments; returns what is wrong with it, if anything."""
    original, method = node.target, node.op == "call_method"
    function, in_place = _lookup(original)
    if function is None:
        return f"{operation_name(original)} changes a tensor in place"
    args, kwargs = list(node.args), dict(node.kwargs)
    if kwargs.pop("out", None) is not None:
        return f"{operation_name(original)}(out=...) writes into a tensor"
    if not args:
        args = [kwargs.pop(name) for name in _INPUT_NAMES if name in kwargs][:1]
    if method and function in _PACKED and len(args) > 1 and not isinstance(args[1], (tuple, list)):
        args = [args[0], tuple(args[1:])]
    in_place = bool(kwargs.pop("inplace", False)) or in_place
    in_place = in_place and not (node.op == "call_function" and is_size(node))
    if function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul):
        args += [kwargs.pop(name) for name in ("other", "exponent", "value") if name in kwargs]
    if function in (operator.add, operator.sub) and (alpha := kwargs.pop("alpha", 1)) != 1:
        with node.graph.inserting_before(node):
            args[1] = node.graph.call_function(operator.mul, (args[1], alpha))
    if function is operator.truediv and kwargs.get("rounding_mode"):
        function = torch.div
    elif function is operator.truediv:
        kwargs.pop("rounding_mode", None)
    if function in (torch.softmax, torch.log_softmax):
        if kwargs.get("dim", args[1] if len(args) > 1 else None) is None:
            function = original  # the dimension depends on the rank: torch's own function knows
        else:
            kwargs.pop("_stacklevel", None)
    if function is torch.where and method and len(args) == 3:
        args = [args[1], args[0], args[2]]
    if original is torch.dropout and "train" in kwargs:
        kwargs["training"] = kwargs.pop("train")
    if function in _LAYERS:
        args, kwargs = _positional(args, kwargs, _LAYER_ARGUMENTS), {}
    if function is F.batch_norm:
        args = _positional(args, kwargs, _NORM_ARGUMENTS)
        args, kwargs = [*args, *list(_NORM_ARGUMENTS.values())[len(args) :]], {}
    node.op, node.target, node.args, node.kwargs = "call_function", function, tuple(args), kwargs
    node.meta["inplace"] = in_place
    return None


def _positional(args: list, kwargs: dict, defaults: dict[str, Any]) -> list:
    """Arguments by position, up to the last that is given; those left out before it at their defaults."""
    given = [*args, *(kwargs.get(name, default) for name, default in list(defaults.items())[len(args) :])]
    last = max([len(args), *(i + 1 for i, name in enumerate(defaults) if name in kwargs)])
    return given[:last]


def _simplify_structure(node: fx.Node) -> None:
    """Drop what does nothing (dropout in eval mode, handed-through values) and open constructors of named tuples."""
    if node.op != "call_function":
        return
    source = node.args[0] if node.args else None
    if (
        node.target is getattr
        and node.args[1] in _NAMED_RESULTS
        and isinstance(source, fx.Node)
        and _has_results(source)
    ):
        node.target, node.args = operator.getitem, (source, _NAMED_RESULTS[node.args[1]])
    elif node.target in DROPOUTS:
        p, training = dropout_settings(node)
        if not training:
            _bypass(node)
        else:
            node.args, node.kwargs = (node.args[0], p, True), {}
    elif isinstance(node.target, type) and issubclass(node.target, tuple) and hasattr(node.target, "_fields"):
        arguments: Any = node.args
        structure: Any = node.target(*arguments, **node.kwargs)
        for user in list(node.users):
            if user.op == "output":
                user.args = (fx.node.map_aggregate(user.args[0], lambda leaf: structure if leaf is node else leaf),)
        if not node.users:
            node.graph.erase_node(node)


_NAMED_RESULTS: dict[Any, int] = {"values": 0, "indices": 1}


def _has_results(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (torch.max, torch.min, torch.median, torch.sort, torch.topk)


def _bypass(node: fx.Node) -> None:
    source = node.args[0]
    with node.graph.inserting_before(node):
        through = node.graph.call_function(torch.clone, (source,))
    through.meta = dict(node.meta) | {"handed_through": True}
    node.replace_all_uses_with(through)
    node.graph.erase_node(node)


def drop_handed_through(module: fx.GraphModule) -> fx.GraphModule:
    """Remove the copies that only kept a module's output apart from its input (fxstn.condition may need them)."""
    module = copied(module)
    for node in list(module.graph.nodes):
        if node.meta.get("handed_through"):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module
