"""The table of decompositions and its decorator.

A decomposition writes out a module or a function that a symbolic trace cannot follow, as the operations that it computes. The
trace calls the decomposition in place of the original. Its operations become nodes, so that parameters inside them respond and
dropout inside them is conditioned. Add one with `@decomposes(module class or function)`; a module's takes the module first. A
decomposition returns NotImplemented where the original should stay one operation with these arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def decomposes(*originals: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: use the function in place of a module class's forward, or of a function that fx does not look into."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS.update(dict.fromkeys(originals, function))
        return function

    return register
