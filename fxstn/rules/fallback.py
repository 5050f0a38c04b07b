"""The tangent of an operation without a rule: torch's own forward mode, or a reason why that cannot work."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Argument, map_aggregate

from fxstn.ir.tangents import ZERO, Scaled
from fxstn.ops.kernels import node_jvp


class NoRule(Exception):
    """An operation has neither a rule nor a fallback for the tangents that reach it; says why."""


# What a fallback would fail on at run time, or, for what leaves torch, silently lose (checked with torch 2.9 to 2.14).
NO_FORWARD_MODE: dict[Callable[..., Any], str] = {
    torch.bincount: "counting has no derivative",
    torch.histc: "counting has no derivative",
    torch.pdist: "torch has no forward-mode derivative of pdist; torch.cdist has a rule",
    **dict.fromkeys([torch.Tensor.item, torch.Tensor.tolist], "a Python number made from it has no tangent"),
    torch.Tensor.numpy: "a numpy array made from it has no tangent",
}


def no_derivative(function: Callable[..., Any]) -> str | None:
    """Why torch.func.jvp cannot differentiate `function`, or None when nothing is known against it."""
    if function in NO_FORWARD_MODE:
        return NO_FORWARD_MODE[function]
    packet = getattr(function, "_qualified_op_name", None) or getattr(function, "_name", None)
    if packet and packet.startswith("aten::"):
        return None
    if packet:
        return f"custom operator {packet} registers no forward-mode derivative"
    if getattr(function, "__module__", "").startswith(("torch.ops.", "torch._ops.")):
        return f"custom operator {function} registers no forward-mode derivative"
    return None


def plain_tangents(tangents: tuple, named: dict) -> tuple[tuple, dict]:
    """Tangents as a function without a rule takes them: None in place of ZERO.

    tangents, named: of its positional arguments and of its keywords.

    Raises NoRule for the tangent of a parameter.
    """

    def plain(tangent: Argument) -> Argument:
        if isinstance(tangent, Scaled):
            raise NoRule("the tangent of a parameter reaches it, which the fallback cannot pass on")
        return None if tangent is ZERO else tangent

    return tuple(map_aggregate(tangent, plain) for tangent in tangents), {
        name: map_aggregate(tangent, plain) for name, tangent in named.items()
    }


def fallback(
    function: Callable[..., Any], tangents: tuple, args: tuple, kwargs: dict, named: dict | None = None,
    by_reverse: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(y, dy) by torch.func.jvp of this one operation.

    tangents, named: of its positional arguments and of its keywords, ZERO where one does not vary.
    by_reverse: by torch's backward, differentiated, in place of its forward mode.

    Raises NoRule where that cannot work.
    """
    if reason := no_derivative(function):
        raise NoRule(reason)
    both = node_jvp(function, by_reverse)(args, kwargs, *plain_tangents(tangents, named or {}))
    return operator.getitem(both, 0), operator.getitem(both, 1)
