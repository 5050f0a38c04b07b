"""register_rule: a user's rule."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxstn.ir.errors import operation_name
from fxstn.ir.facts import overloads
from fxstn.ir.spelling import Unspellable, origin_of, respell, signature_of, whole_operator
from fxstn.rules.registry import RULES, bilinear, linear, pointwise, zero

_OWN: set[Callable[..., Any]] = set()  # operations whose rules are of this call, which a later one replaces
_KINDS: dict[str, Callable[..., None]] = {"linear": linear, "bilinear": bilinear, "zero": zero}


def register_rule(function: Callable[..., Any], *partials: Callable[..., Any], kind: str | None = None) -> None:
    """Teach fxstn the tangent of one operation: of a custom operator, say, or a Python function given to `torch.fx.wrap`.

    function: as models call it.
    partials: one for each of its first arguments that may vary, partial(dx, y, *arguments), which gives that argument's part
        of dy in torch operations, linear and differentiable in dx.
    kind: in place of partials. "linear" (the same operation on the tangent of the first argument), "bilinear" (of the first
        two), "zero" (no tangent comes out).

    A later call for the same operation replaces an earlier one. `fxstn.verify` then checks models that use it. Rules written
    out with more freedom: `fxstn.rules.registry.rule`.

    Raises ValueError for an operation that fxstn has a rule for, for what is no operation of a graph (a module, a function of
    Python's, what returns no tensor), an unknown kind, or neither partials nor a kind, TypeError for what is no function.
    """
    if not callable(function):
        raise TypeError(f"register_rule takes the operation as models call it, a function, got {function!r}")
    if wrong := [partial for partial in partials if not callable(partial)]:
        raise TypeError(f"register_rule: the partial {wrong[0]!r} must be a function, partial(dx, y, *arguments)")
    operator = whole_operator(getattr(function, "_opoverload", function))  # of torch.library.custom_op
    canonical = operator if operator in RULES else _operation(operator, kind)
    if (kind is None) is not bool(partials) or (kind is not None and kind not in _KINDS):
        raise ValueError(
            f"give partials, or a kind out of {', '.join(_KINDS)}; got {len(partials)} partials, kind={kind!r}"
        )
    if canonical in _OWN:
        RULES.pop(canonical, None)
    if kind is None:
        pointwise(canonical, *partials)
    else:
        _KINDS[kind](canonical)
    _OWN.add(canonical)


def _operation(function: Callable[..., Any], kind: str | None) -> Callable[..., Any]:
    """The operation of a graph that a function is. Raises ValueError, which says what to register, where it is none."""
    name, module = operation_name(function), getattr(function, "__module__", None) or ""
    if isinstance(function, (type, nn.Module)):
        owner = function if isinstance(function, type) else type(function)
        name = ("nn." if owner.__module__.startswith("torch.nn.") else "") + owner.__name__
        what = "a module" if issubclass(owner, nn.Module) else "a class"
        remedy = "the functions that its forward calls, F.relu for nn.ReLU say"
    elif module.partition(".")[0] in sys.stdlib_module_names - {"_operator"}:
        name, what = f"{module}.{name.rpartition('.')[2]}".removeprefix("builtins."), "a function of Python's"
        remedy = (
            "torch's operation in its place, torch.abs for abs say, or a function of your own, given to torch.fx.wrap"
        )
    elif not _returns_tensor(canonical := _canonical(function), or_size=kind == "zero"):
        what, remedy = "a function that returns no tensor", "the operation whose tensor the model goes on with"
    else:
        return canonical
    raise ValueError(f"register_rule: {name} is {what}, and no operation with a tangent; register {remedy}")


def _returns_tensor(function: Callable[..., Any], or_size: bool) -> bool:
    """Whether a call of a function is an operation with a tangent, as far as torch says.

    or_size: whether a number counts, too, such as a size, whose tangent is zero.
    """
    if schemas := [overload._schema for overload in overloads(function)]:
        return or_size or any("Tensor" in str(result.type) for schema in schemas for result in schema.returns)
    if origin_of(function)[0] == "method":  # of torch, without a schema: backward, tolist, cdouble
        try:
            result = function(torch.empty(1, 1, device="meta"))
        except Exception:  # whatever it needs more than a tensor, it makes none from one
            return False
        return or_size or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
    return getattr(function, "__module__", "") == F.__name__ or function not in torch.overrides.get_ignored_functions()


def _canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands for this spelling in a graph, where a rule of its own can be given to it.

    Raises ValueError where that function has a rule already, or other arguments than this spelling.
    """
    name, schemas = operation_name(function), [overload._schema for overload in overloads(function)]
    try:
        if any(argument.is_out for schema in schemas for argument in schema.arguments):
            raise Unspellable(name)
        spelled = respell(function, *_stand_ins(function))
    except Unspellable:
        raise ValueError(
            f"register_rule: {name} changes a tensor in place; register the operation that returns a new tensor"
        ) from None
    canonical = spelled.function
    if operation_name(canonical) == name and canonical is not function:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', name)}"  # torch._C._nn.elu is no F.elu
    if canonical is not function and canonical in RULES:
        raise ValueError(
            f"register_rule: a graph has {operation_name(canonical)} in place of {name}, and that already has a "
            f"rule ({RULES[canonical].kind}); there is nothing to register"
        )
    if canonical is not function and signature_of(function):
        raise ValueError(
            f"register_rule: a graph has {operation_name(canonical)} in place of {name}, with other arguments; register the "
            f"rule for {operation_name(canonical)}"
        )
    return canonical


def _stand_ins(function: Callable[..., Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of the types that an operation takes, to see its canonical spelling; nothing is computed with them."""
    if known := overloads(function):
        arguments = known[0]._schema.arguments
        entries = [argument for argument in arguments if not argument.has_default_value()]
        values = {argument.name: _stand_in(str(argument.type)) for argument in entries}
        return _split(values, {argument.name for argument in entries if argument.kwarg_only})
    signature = signature_of(function)
    parameters = inspect.signature(signature).parameters.values() if signature else ()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(torch.empty(0) for _ in required), {}


def _split(values: Mapping[str, object], named: set[str]) -> tuple[tuple, dict[str, Any]]:
    return tuple(value for name, value in values.items() if name not in named), {n: values[n] for n in named}


def _stand_in(type_name: str) -> object:
    """A value of a schema's type."""
    if type_name.startswith("List["):
        entry = type_name.removeprefix("List[").removesuffix("]")
        return [_stand_in(entry)] * (2 if entry == "Tensor" else 1)  # torch.linalg.multi_dot takes no less
    if type_name.startswith("Optional["):
        return None
    values = {"Tensor": torch.empty(0), "int": 0, "float": 0.0, "number": 0, "bool": False, "str": ""}
    return values.get(type_name)
