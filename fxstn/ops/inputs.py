"""Checks of later batches, inside the graphs: the sizes and values that export fixed, and what it took for true.

No node reads the result of a check; simplify keeps the checks because they count as effects.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from types import CodeType

import torch
from torch import Tensor

from fxstn.ir.staging import staged

_REMEDY = "give transform example_inputs of the kind that you train with"


@staged
def require_sizes(x: Tensor, sizes: tuple[int | None, ...], name: str) -> None:
    """Raise ValueError unless x has these sizes; None stands for any."""
    shape = tuple(x.shape) if isinstance(x, Tensor) else None
    if shape is None or len(shape) != len(sizes) or any(n not in (None, m) for n, m in zip(sizes, shape, strict=True)):
        free = ("batch", *["any"] * len(sizes))
        expected = ", ".join(free[i] if size is None else str(size) for i, size in enumerate(sizes))
        what = f"is {x!r}" if shape is None else f"has shape {shape}"
        raise ValueError(f"{name} {what}, but the network was exported with ({expected}); {_REMEDY}")


@staged
def require_guards(guards: tuple[str, ...], inputs: Mapping[str, object]) -> None:
    """Raise ValueError unless the sizes of the inputs are such that the graph holds, as export writes it.

    guards: expressions such as "L['ids'].size()[1] <= 64".
    inputs: the arguments of the forward by name.

    torch.compile leaves this out, which has guards of its own; `GraphCache` looks before it calls what is compiled.
    """
    if torch.compiler.is_compiling():
        return
    for guard in guards:
        if not eval(_compiled(guard), {"L": inputs, "math": math, "torch": torch}):
            shown = re.sub(r"L\['(\w+)'\]", r"\1", guard).replace(".size()", ".shape")
            raise ValueError(f"the network was exported for sizes of its inputs with {shown}; {_REMEDY}")


@functools.cache
def _compiled(guard: str) -> CodeType:
    return compile(guard, "<guard of torch.export>", "eval")


@staged
def require_equal(value: object, expected: object, name: str) -> None:
    """Raise ValueError unless an input that is no tensor has the value that the graph has taken over."""
    if isinstance(value, Tensor) or type(value) is not type(expected) or value != expected:
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is {shown}, but the network was exported with {expected!r}; {_REMEDY}")


SIZE_REQUIREMENTS: tuple[Callable[..., None], ...] = (require_sizes, require_guards)
REQUIREMENTS = {*SIZE_REQUIREMENTS, require_equal}
