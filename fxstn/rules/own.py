"""A user's own rule, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxstn.ir.spelling import respell
from fxstn.rules.registry import RULES, bilinear, linear, pointwise, zero

_KINDS: dict[str, Callable[..., None]] = {"linear": linear, "bilinear": bilinear, "zero": zero}


def register_rule(function: Callable[..., Any], *partials: Callable[..., Any], kind: str | None = None) -> None:
    """Teach fxstn the tangent of one operation: of a custom operator, say, or a Python function given to `torch.fx.wrap`.

    function: as models call it. partials: one for each of its first arguments that may vary, partial(dx, y, *arguments),
    which gives that argument's part of dy in torch operations, linear and differentiable in dx. Or kind: "linear" (the same
    operation on the tangent of the first argument), "bilinear" (of the first two), "zero" (no tangent comes out).
    `fxstn.verify` then checks models that use it. Rules written out with more freedom: `fxstn.rules.registry.rule`.

    Raises ValueError for an operation that has a rule, an unknown kind, or neither partials nor a kind, TypeError for what is
    no function.
    """
    if not callable(function):
        raise TypeError(f"register_rule takes the operation as models call it, a function, got {function!r}")
    if wrong := [partial for partial in partials if not callable(partial)]:
        raise TypeError(f"register_rule: the partial {wrong[0]!r} must be a function, partial(dx, y, *arguments)")
    operator = getattr(function, "_opoverload", function)  # of torch.library.custom_op
    canonical = respell(operator, (), {}).function if operator not in RULES else operator
    if partials and kind is None:
        pointwise(canonical, *partials)
    elif kind is not None and kind in _KINDS and not partials:
        _KINDS[kind](canonical)
    else:
        raise ValueError(
            f"give partials, or a kind out of {', '.join(_KINDS)}; got {len(partials)} partials, kind={kind!r}"
        )
