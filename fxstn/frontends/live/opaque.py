"""The tangent of a Python function that a graph holds as one node: its operations are followed when it runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.frontends.live.containers import tensors_in
from fxstn.frontends.live.duals import Duals
from fxstn.ir.staging import staged
from fxstn.rules.registry import plain_tangents


@functools.cache
def function_jvp(function: Callable[..., Any]) -> Callable[..., Any]:
    """A staged (args, kwargs, tangents, named tangents) → (y, dy) by live duals through one function, whatever its Python does.

    tangents: shaped like args, None where nothing varies. dy has the structure of y: zeros where nothing varies, None for
    what is not float. Raises TransformError for what live duals cannot follow.
    """

    def jvp(args: tuple, kwargs: dict, tangents: tuple, named: dict) -> tuple[Any, Any]:
        duals = Duals(nn.Module(), {})
        _record(duals, args, tangents)
        _record(duals, [kwargs[name] for name in named], list(named.values()))
        duals.made(tensors_in((args, kwargs)))
        with torch.enable_grad(), duals.following():
            y = function(*args, **kwargs)
        duals.finish(y)
        return y, duals.tangents_of(y)

    jvp.__name__ = f"jvp_{function.__name__}"
    return staged(derivative_of=function)(jvp)


def opaque_tangent(
    function: Callable[..., Any], tangents: tuple, args: tuple, kwargs: dict, named: dict
) -> tuple[Any, Any]:
    """(y, dy) of one call of a Python function that fx does not look into, as `fxstn.rules.apply_rule` gives of others.

    Raises NoRule where a parameter's structured tangent reaches it.
    """
    both = function_jvp(function)(args, kwargs, *plain_tangents(tangents, named))
    return operator.getitem(both, 0), operator.getitem(both, 1)


def _record(duals: Duals, value: Any, tangent: Any) -> None:
    if isinstance(tangent, Tensor):
        duals.table.record(value, tangent)
    elif isinstance(tangent, (list, tuple)):
        for inner, moved in zip(value, tangent, strict=True):
            _record(duals, inner, moved)
