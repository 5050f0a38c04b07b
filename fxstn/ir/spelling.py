"""The names of operations: methods, operators, dunders, in-place variants, ATen overloads → one canonical function each.

`respell` works on values of any kind, nodes of a graph or tensors, and computes nothing: `fxstn.passes.canonicalize` applies it
to every node, and a function mode can apply it to every call that it sees.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Target

from fxstn.ir.errors import operation_name
from fxstn.ir.layer_signatures import ANY, METHODS, RAW
from fxstn.ir.signatures import Spelled, Unspellable, spell

__all__ = ["Spelled", "Unspellable", "respell"]

Tensor = torch.Tensor

# Names with another canonical function than the one found under them, whatever namespace they are taken from.
NAMES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(["__mul__"], operator.mul),
    **dict.fromkeys(["__truediv__", "__div__"], operator.truediv),
    **dict.fromkeys(["floor_divide", "__floordiv__"], operator.floordiv),
    **dict.fromkeys(["mod", "__mod__"], torch.remainder),
    **dict.fromkeys(["__pow__"], operator.pow),
    **dict.fromkeys(["__matmul__"], operator.matmul),
    **dict.fromkeys(["neg", "negative", "__neg__"], operator.neg),
    **dict.fromkeys(["bitwise_and", "__and__"], operator.and_),
    **dict.fromkeys(["bitwise_or", "__or__"], operator.or_),
    **dict.fromkeys(["bitwise_xor", "__xor__"], operator.xor),
    **dict.fromkeys(["bitwise_not", "__invert__"], operator.invert),
    **dict.fromkeys(["eq", "__eq__"], operator.eq),
    **dict.fromkeys(["ne", "not_equal", "__ne__"], operator.ne),
    **dict.fromkeys(["lt", "less", "__lt__"], operator.lt),
    **dict.fromkeys(["le", "less_equal", "__le__"], operator.le),
    **dict.fromkeys(["gt", "greater", "__gt__"], operator.gt),
    **dict.fromkeys(["ge", "greater_equal", "__ge__"], operator.ge),
    "__getitem__": operator.getitem,
    "__add__": operator.add,
    "__sub__": operator.sub,
    **dict.fromkeys(["absolute", "__abs__"], torch.abs),
    "relu": F.relu,
    "selu": F.selu,
    "celu": F.celu,
    "threshold": F.threshold,
    "rms_norm": F.rms_norm,
    "log_sigmoid": F.logsigmoid,
    **dict.fromkeys(["sigmoid", "special_expit"], torch.sigmoid),
    "tanh": torch.tanh,
    "clip": torch.clamp,
    **dict.fromkeys(["concat", "concatenate"], torch.cat),
    "swapdims": torch.swapaxes,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], torch.split),
    "unsafe_chunk": torch.chunk,
    "row_stack": torch.vstack,
    "moveaxis": torch.movedim,
    "ger": torch.outer,
    "fix": torch.trunc,
    "special_gammaln": torch.lgamma,
    "special_psi": torch.digamma,
    **{f"arc{name}": getattr(torch, f"a{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")},
    **{
        f"special_{name}": getattr(torch, name)
        for name in (
            "erf",
            "erfc",
            "erfinv",
            "exp2",
            "expm1",
            "log1p",
            "digamma",
            "sinc",
            "logit",
            "xlogy",
            "logsumexp",
            "round",
        )
    },
    "linalg_matmul": operator.matmul,
    "linalg_diagonal": torch.diagonal,
    "rrelu": F.rrelu,
    "meshgrid": torch.meshgrid,
    **dict.fromkeys(["size", "sym_size"], Tensor.size),
    **dict.fromkeys(["numel", "nelement", "sym_numel"], Tensor.numel),
    **dict.fromkeys(["stride", "sym_stride"], Tensor.stride),
    **dict.fromkeys(["storage_offset", "sym_storage_offset"], Tensor.storage_offset),
    **dict.fromkeys(["dim", "ndimension"], Tensor.dim),
    "is_floating_point": Tensor.is_floating_point,
}
# Modules in which a function's name says what it does.
_KNOWN = {"_operator", "torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._C._special",
          "torch._C._linalg", "torch._C._fft"}  # fmt: skip
_PACKED = {torch.reshape, torch.permute, torch.flip, torch.tile}  # as methods they take sizes as separate arguments
_UNPACKED = {Tensor.view, Tensor.expand, Tensor.repeat}  # and these always do
_INPUT_NAMES = ("input", "self", "tensors", "tensor", "x")
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
)
_IN_PLACE_METHODS = {f"__i{name}__": f"__{name}__" for name in (*_OPERATORS, "div")}
IN_PLACE_OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, f"__{name}__") for name in _OPERATORS}


def respell(target: Target, args: tuple, kwargs: dict[str, Any]) -> Spelled:
    """The canonical spelling of target(*args, **kwargs). What has only one spelling comes back as it is.

    target: a method's name, a torch function or operator, a Tensor method or property getter as a TorchFunctionMode sees
        it, or an ATen overload.
    args, kwargs: handed through, never computed with.

    Raises Unspellable for a mutation without a functional counterpart.
    """
    if isinstance(target, types.MethodWrapperType):
        return _attribute(target, args)
    if target in IN_PLACE_OPERATORS:
        return replace(respell(IN_PLACE_OPERATORS[target], args, kwargs), in_place=True)
    origin, name, in_place = origin_of(target)
    args, kwargs = tuple(args), dict(kwargs)
    if origin == "other" and not isinstance(target, str):
        return Spelled(whole_operator(target), args, kwargs)
    if "axis" in kwargs and name != "segment_reduce":  # which has no dim
        kwargs["dim"] = kwargs.pop("axis")
    if kwargs.pop("out", None) is not None:
        raise Unspellable(f"{operation_name(target)}(out=...) writes into a tensor")
    if not args:
        args = tuple([kwargs.pop(key) for key in _INPUT_NAMES if key in kwargs][:1])
    place = _inplace_position(target)
    in_place = bool(kwargs.pop("inplace", False)) or in_place or (place is not None and any(args[place:]))
    args = args[:place]
    if signature := signature_of(target):
        return replace(signature(*args, **kwargs), in_place=in_place)
    function = _function(target)
    if function is None:
        reason = "changes a tensor in place" if in_place else "is no method of a tensor"
        raise Unspellable(f"{operation_name(target)} {reason}")
    if origin == "method" and function in _PACKED and len(args) > 1 and not isinstance(args[1], (tuple, list)):
        args = (args[0], args[1:])
    if function in _UNPACKED and len(args) == 2 and isinstance(args[1], (tuple, list)) and args[1]:  # () stays as it is
        args = (args[0], *args[1])
    if kwargs:
        args, kwargs = _by_position(function, args, kwargs)
    return Spelled(function, args, kwargs, in_place)


def whole_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator in place of its only overload, which is what torch.export writes; anything else comes back as it is."""
    if isinstance(function, OpOverload) and len(function.overloadpacket.overloads()) == 1:
        return function.overloadpacket if origin_of(function)[0] == "other" else function
    return function


def _attribute(getter: types.MethodWrapperType, args: tuple) -> Spelled:
    """A property of Tensor, as a function mode sees it: Tensor.shape.__get__."""
    name = getattr(getter.__self__, "__name__", "")
    if getter.__name__ != "__get__":
        raise Unspellable(f"assigning .{name} changes a tensor in place")
    return spell(torch.detach, args[0]) if name == "data" else spell(getattr, args[0], name)


@functools.cache
def origin_of(target: Target) -> tuple[str, str, bool]:
    """What the name of a spelling says.

    Returns three things: where it is from, the name of the operation by values, and whether this spelling works in place.
    It is from "method", "operator", "aten", "builtin" (in torch, with ATen's signatures), "function" (in torch, written in
    Python), or "other", where a name says nothing.
    """
    name: str = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None)
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        qualified = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
        namespace, _, name = qualified.partition("::")
        origin = "aten" if namespace == "aten" else "other"
    elif (
        isinstance(target, (str, types.MethodDescriptorType, types.WrapperDescriptorType)) or module == "torch._tensor"
    ):
        origin = "method"
    elif module in _KNOWN:
        origin = "operator" if module == "_operator" else "function" if inspect.isfunction(target) else "builtin"
    else:
        return "other", name, False
    if name in ("setitem", "__setitem__"):
        return origin, name, True
    if name in _IN_PLACE_METHODS:
        return origin, _IN_PLACE_METHODS[name], True
    if name.endswith("_") and not name.endswith("__"):
        return origin, name[:-1], origin != "operator"  # operator.and_ has its underscore from Python's keyword
    return origin, name, False


@functools.cache
def _inplace_position(target: Target) -> int | None:
    """Where a function of torch.nn.functional takes `inplace`, its last argument."""
    if not inspect.isfunction(target) or target.__module__ != "torch.nn.functional":
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


@functools.cache
def signature_of(target: Target) -> Callable[..., Spelled] | None:
    """The signature of this spelling in fxstn.ir.signatures, where it differs from the canonical function's."""
    origin, name, in_place = origin_of(target)
    if origin == "other" or (origin == "operator" and target is not operator.setitem):
        return None
    names = (f"{name}.{target._overloadname}", name) if isinstance(target, OpOverload) else (name,)
    names = (f"{name}_", *names) if in_place else names
    own = METHODS if origin == "method" else {} if origin == "function" else RAW
    return next((table[key] for table in (own, ANY) for key in names if key in table), None)


_OTHER_MEANING = {"normal", "random"}  # torch.normal(x) takes x as a mean
_PREFIXES = {"linalg_": torch.linalg, "special_": torch.special, "fft_": torch.fft}


@functools.cache
def _function(target: Target) -> Callable[..., Any] | None:
    """The canonical function with the arguments of this spelling; None for a mutation without one."""
    origin, name, in_place = origin_of(target)
    itself = None if in_place or isinstance(target, str) else target
    if in_place and name in _OTHER_MEANING:
        return None
    if origin == "operator":
        return NAMES.get(f"__{name.strip('_')}__", itself)
    if name in NAMES:
        return NAMES[name]
    if origin == "function" and itself is not None:
        return itself
    namespaces = [(torch, name), (F, name), (Tensor, name)]
    if origin == "method" and not in_place:
        namespaces = [(torch, name), (Tensor, name)]
    namespaces += [
        (module, name.removeprefix(prefix)) for prefix, module in _PREFIXES.items() if name.startswith(prefix)
    ]
    for namespace, key in namespaces:
        candidate = getattr(namespace, key, None)  # torch.float is a dtype, Tensor.float a routine
        if inspect.isroutine(candidate) and _takes_the_same(candidate, target):
            return candidate
    return itself


def _takes_the_same(function: Callable[..., Any], target: Target) -> bool:
    """Whether a function takes the arguments of an ATen overload or builtin in their order; builtins share ATen's."""
    if not inspect.isfunction(function) or isinstance(target, str):
        return True
    packet = getattr(torch.ops.aten, getattr(target, "__name__", ""), None)
    overload = target if isinstance(target, OpOverload) else getattr(packet, "default", None)
    if overload is None:
        return True
    names = _argument_names(overload)
    return names == list(inspect.signature(function).parameters)[: len(names)]


def _argument_names(overload: OpOverload, keywords: bool = True) -> list[str]:
    arguments = [argument for argument in overload._schema.arguments if keywords or not argument.kwarg_only]
    return ["input" if argument.name == "self" else argument.name for argument in arguments]


def _by_position(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Keywords that continue the positional arguments join them."""
    for name in _positions(function, frozenset(kwargs))[len(args) :]:
        if name not in kwargs:
            break
        args += (kwargs.pop(name),)
    return args, kwargs


@functools.cache
def _positions(function: Callable[..., Any], keywords: frozenset[str]) -> tuple[str, ...]:
    """Names of a function's positional arguments, in the overload that knows these keywords."""
    if inspect.isfunction(function):
        parameters = inspect.signature(function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    packet = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    for overload in packet.overloads() if isinstance(packet, OpOverloadPacket) else ():
        if keywords <= set(_argument_names(getattr(packet, overload))):
            return tuple(_argument_names(getattr(packet, overload), keywords=False))
    return ()
