"""The tangent of a Python function that a graph holds as one node: its operations are followed when it runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxstn.frontends.live.duals import Duals
from fxstn.ir.containers import tensors_in
from fxstn.ir.staging import staged
from fxstn.rules.fallback import plain_tangents


@functools.cache
def function_jvp(function: Callable[..., object]) -> Callable[..., tuple[object, object]]:
    """A staged (args, kwargs, tangents, named tangents) → (y, dy): live duals through one function, whatever its Python does.

    tangents: shaped like args; None where nothing varies.
    named tangents: {name of a keyword: tangent}, likewise.

    dy has the structure of y: zeros where nothing varies, None for what is not float. Raises TransformError for what live
    duals cannot follow.
    """

    def jvp(args: tuple, kwargs: dict, tangents: tuple, named: dict) -> tuple[object, object]:
        duals = Duals(nn.Module(), {})
        _record(duals, args, tangents)
        _record(duals, [kwargs[name] for name in named], list(named.values()))
        duals.add_constants(tensors_in((args, kwargs)))
        with torch.enable_grad(), duals.active():
            y = function(*args, **kwargs)
        duals.finish(y)
        return y, duals.tangents_of(y)

    jvp.__name__ = f"jvp_{function.__name__}"
    return staged(derivative_of=function)(jvp)


def opaque_tangent(
    function: Callable[..., object], tangents: tuple, args: tuple, kwargs: dict, named: dict
) -> tuple[object, object]:
    """(y, dy) of one call of a Python function that fx does not look into, as `fxstn.rules.apply_rule` gives of others.

    Raises NoRule where a parameter's structured tangent reaches it.
    """
    both = function_jvp(function)(args, kwargs, *plain_tangents(tangents, named))
    return operator.getitem(both, 0), operator.getitem(both, 1)


def _record(duals: Duals, value: object, tangent: object) -> None:
    """Enter the tangents of arguments, which are shaped like the arguments."""
    if isinstance(tangent, Tensor):
        assert isinstance(value, Tensor)
        duals.table.record(value, tangent)
    elif isinstance(tangent, (list, tuple)):
        assert isinstance(value, (list, tuple))
        for inner_value, inner_tangent in zip(value, tangent, strict=True):
            _record(duals, inner_value, inner_tangent)
