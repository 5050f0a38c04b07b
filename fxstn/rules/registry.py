"""The rule table: one tangent rule per canonical operation, and the kinds that make most rules one line.

A rule is called with the tangents, the positional arguments and the keywords of one operation, of which at least one
tangent is not ZERO, and returns (y, dy). It is written with ordinary operations and staged helpers, so the same rule runs
on tensors (tests, debugging) and on fx proxies (the pushforward pass).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from fxstn.ir.errors import operation_name
from fxstn.ir.staging import call, draws
from fxstn.ir.tangents import ZERO, Scaled, all_zero
from fxstn.ops.kernels import expand_like, of_real_numbers
from fxstn.rules.fallback import fallback

Apply = Callable[[tuple, tuple, dict], tuple[Any, Any]]


@dataclass(frozen=True)
class ParameterRole:
    """How a layer reads a parameter.

    role: "weight", "bias" or "table" of a layer, "gain" or "shift" of a norm.
    axes: along which its tangent may be scaled.
    """

    role: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """The tangent rule of one operation.

    kind: what `explain` shows.
    apply: (tangents, args, kwargs) → (y, dy).
    signature: the parameters, where known.
    reads: {position: ParameterRole} of a hyperlayer.
    finite: as apply, but y at weights moved by a finite step; None where that is y + dy, because the operation is linear in
        them.
    random: whether the operation draws random numbers, where torch has no tag that says so.
    fresh: whether the result is in memory of its own. Needed where torch has no schema that says so.
    elementwise: number of leading arguments that are broadcast against each other, entry by entry; 0 for any other operation.
    """

    kind: str
    apply: Apply
    signature: inspect.Signature | None = None
    reads: Mapping[int, ParameterRole] = field(default_factory=dict)
    finite: Callable[[tuple, tuple, dict], Any] | None = None
    random: bool = False
    fresh: bool = False
    elementwise: int = 0


RULES: dict[Callable[..., Any], Rule] = {}
_NONE: Mapping[int, ParameterRole] = MappingProxyType({})


def register(
    function: Callable[..., Any],
    kind: str,
    apply: Apply,
    signature: inspect.Signature | None = None,
    reads: Mapping[int, ParameterRole] = _NONE,
    finite: Callable[[tuple, tuple, dict], Any] | None = None,
    random: bool = False,
    fresh: bool = False,
    elementwise: int = 0,
) -> None:
    """Enter one rule.

    function: the canonical function of the operation.
    kind, apply, signature, reads, finite, random, fresh, elementwise: as in `Rule`.

    Raises ValueError when `function` already has one: a silent overwrite hides a mistake.
    """
    if function in RULES:
        raise ValueError(
            f"{operation_name(function)} already has a rule ({RULES[function].kind}); there is nothing to register"
        )
    RULES[function] = Rule(kind, apply, signature, reads, finite, random, fresh, elementwise)


def total(*terms: tuple[Any, Callable[[Any], Any]]) -> Any:
    """Σ term(tangent) over the pairs (tangent, term) whose tangent is not ZERO; ZERO where there is none."""
    result: Any = ZERO
    for tangent, term in terms:
        if tangent is not ZERO:
            result = term(tangent) if result is ZERO else result + term(tangent)
    return result


def filled(tangent: Any, primal: Any) -> Any:
    """The tangent, or real zeros shaped like its primal where it is ZERO."""
    if tangent is not ZERO:
        return tangent
    return 0 if isinstance(primal, (int, float, complex)) else torch.zeros_like(primal)


def linear(
    *functions: Callable[..., Any], tangent: Callable[..., Any] | None = None, fresh: bool = False, sizes: bool = False
) -> None:
    """Linear in the first argument, a tensor or a list of tensors: the same operation on the tangent.

    tangent: another spelling of the operation for the tangent, whose memory format may differ from the primal's.
    fresh: as in `Rule`.
    sizes: whether the other arguments give nothing but their sizes.
    """
    for function in functions:

        def apply(
            tangents: tuple, args: tuple, kwargs: dict, function: Callable[..., Any] = function
        ) -> tuple[Any, Any]:
            if not sizes and not all_zero(tangents[1:]):
                return fallback(function, tangents, args, kwargs)
            if (dx := tangents[0]) is ZERO:
                return call(function, *args, **kwargs), ZERO
            if isinstance(dx, (list, tuple)):
                dx = [filled(d, x) for d, x in zip(dx, args[0], strict=True)]
            return call(function, *args, **kwargs), call(tangent or function, dx, *args[1:], **kwargs)

        register(function, "linear", apply, fresh=fresh)


def pointwise(
    function: Callable[..., Any], *partials: Callable[..., Any], fresh: bool = True, elementwise: int | None = None,
    real: bool = False,
) -> None:  # fmt: skip
    """Elementwise in its first arguments: dy = Σ partial(dx, y, *arguments).

    With one partial it may also be any other function of its first argument alone.

    partials: one for each of these arguments; each has the shape of y. Their parameters after y have the names of torch's own
        arguments.
    fresh, elementwise: as in `Rule`. Default: all of several arguments are broadcast.
    real: whether the partials hold for real numbers alone, and torch.func.jvp takes their place where numbers are complex.
    """
    parameters = list(inspect.signature(partials[0]).parameters.values())[2:]
    if real:
        partials = tuple(of_real_numbers(function, i, partial) for i, partial in enumerate(partials))

    def apply(tangents: tuple, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        if not all_zero(tangents[len(partials) :]):
            return fallback(function, tangents, args, kwargs)
        y = call(function, *args, **kwargs)
        terms = zip(tangents, partials, strict=False)
        return y, total(*((dx, lambda dx, partial=partial: partial(dx, y, *args, **kwargs)) for dx, partial in terms))

    if elementwise is None:
        elementwise = len(partials) if len(partials) > 1 else 0
    register(function, "pointwise", apply, inspect.Signature(parameters), fresh=fresh, elementwise=elementwise)


def additive(function: Callable[..., Any]) -> None:
    """function(a, b) linear in (a, b) jointly: the operation on the tangents, either of which may be ZERO."""

    def apply(tangents: tuple, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        y = call(function, *args, **kwargs)
        da, db = tangents
        if da is not ZERO and db is not ZERO:
            return y, call(function, da, db)
        if db is ZERO:
            return y, da if isinstance(args[1], (int, float)) else expand_like(da, y)
        db = db if function is operator.add else call(function, 0, db)
        return y, db if isinstance(args[0], (int, float)) else expand_like(db, y)

    register(function, "additive", apply, fresh=True, elementwise=2)


def bilinear(*functions: Callable[..., Any], second: str = "other", elementwise: bool = False) -> None:
    """Linear in each of two arguments: dy = f(da, b) + f(a, db).

    second: name of the second argument; the first is called input.
    elementwise: whether the two are broadcast against each other, entry by entry.
    """
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("input", second)]
    for function in functions:

        def apply(
            tangents: tuple, args: tuple, kwargs: dict, function: Callable[..., Any] = function
        ) -> tuple[Any, Any]:
            rest = {name: value for name, value in kwargs.items() if name != second}
            a, b, *more = args if len(args) > 1 else (*args, kwargs[second])
            da, db = (*tangents, ZERO)[:2]
            product = lambda a, b: call(function, a, b, *more, **rest)  # noqa: E731
            return product(a, b), total((da, lambda da: product(da, b)), (db, lambda db: product(a, db)))

        register(function, "bilinear", apply, inspect.Signature(names), fresh=True, elementwise=2 * elementwise)


def transposed(*functions: Callable[..., Any]) -> None:
    """By the fallback, but as the transpose of torch's backward: its forward mode has no such conventions at zeros and ties."""
    for function in functions:

        def apply(
            tangents: tuple, args: tuple, kwargs: dict, function: Callable[..., Any] = function
        ) -> tuple[Any, Any]:
            return fallback(function, tangents, args, kwargs, by_reverse=True)

        register(function, "transposed", apply, fresh=True)


def zero(*functions: Callable[..., Any], fresh: bool = False) -> None:
    """Piecewise constant, an index, a shape, or cut off on purpose (detach): the tangent is ZERO.

    fresh: as in `Rule`.
    """
    for function in functions:

        def apply(_: tuple, args: tuple, kwargs: dict, function: Callable[..., Any] = function) -> tuple[Any, Any]:
            return call(function, *args, **kwargs), ZERO

        register(function, "zero", apply, fresh=fresh)


def rule(
    *functions: Callable[..., Any],
    kind: str = "own",
    reads: Mapping[int, ParameterRole] = _NONE,
    finite: Callable[..., Any] | None = None,
    random: bool = False,
    fresh: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a rule written out: body(d, *arguments) → (y, dy).

    The body's parameters after `d` have the names of torch's own arguments. `d` has their tangents by these names, for
    `*tensors` a tuple of them.

    kind, random, fresh: as in `Rule`.
    reads: of a layer, which of its arguments may be parameters with a response. Their tangents are Scaled.
    finite: of a layer that is not linear in them, finite(d, *arguments) → y where they are moved by all of `d`.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(body).parameters.values())[1:]
        signature, names = inspect.Signature(parameters), [parameter.name for parameter in parameters]

        def applied(function: Callable[..., Any]) -> Callable[[tuple, tuple, dict], Any]:
            def apply(tangents: tuple, args: tuple, kwargs: dict) -> Any:
                bound = signature.bind(*args, **kwargs)
                d = SimpleNamespace(**dict.fromkeys(names, ZERO) | dict(zip(names, tangents, strict=False)))
                for i, parameter in enumerate(parameters):
                    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                        setattr(d, parameter.name, tangents[i:])
                return function(d, *bound.args, **bound.kwargs)

            return apply

        for function in functions:
            register(function, kind, applied(body), signature, reads, finite and applied(finite), random, fresh)
        return body

    return decorate


def kind_of(function: Callable[..., Any], tangents: Iterable[object]) -> str:
    """What `explain` calls an operation: a hyperlayer where it reads a parameter that responds, else the kind of its rule."""
    if any(isinstance(tangent, Scaled) for tangent in tangents):
        return "hyperlayer"
    return RULES[function].kind if function in RULES else "fallback"


def apply_rule(
    function: Callable[..., Any], tangents: tuple, args: tuple, kwargs: dict, named: dict | None = None
) -> tuple[Any, Any]:
    """(y, dy) of one operation.

    tangents: one entry per positional argument, ZERO where it does not vary.
    named: tangents of keywords, which a rule with known parameters and the fallback can take.

    Raises NoRule, with the reason, where there is neither a rule nor a derivative in torch.
    """
    known, named = RULES.get(function), named or {}
    varying = [name for name, tangent in named.items() if not all_zero(tangent)]
    if varying:
        parameters = list(known.signature.parameters.values()) if known and known.signature else []
        last = max((i for i, parameter in enumerate(parameters) if parameter.name in varying), default=-1)
        moved = parameters[len(args) : last + 1]
        names = {parameter.name for parameter in moved if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
        if not names.issuperset(varying):
            return fallback(function, tangents, args, kwargs, named)
        kwargs = dict(kwargs)
        args = (*args, *(kwargs.pop(parameter.name, parameter.default) for parameter in moved))
        tangents = (*tangents, *(named.get(parameter.name, ZERO) for parameter in moved))
    if all_zero(tangents) or draws(function):
        return call(function, *args, **kwargs), ZERO
    return known.apply(tangents, args, kwargs) if known else fallback(function, tangents, args, kwargs)
