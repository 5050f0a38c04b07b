"""Checks of later batches, inside the graphs: the sizes and values that export fixed, and autocast.

No node reads the result of a check; simplify keeps the checks because they count as effects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged

_REMEDY = "give transform example_inputs of the kind that you train with"


@staged
def require_sizes(x: Tensor, sizes: tuple[int | None, ...], name: str) -> None:
    """Raise ValueError unless x has these sizes; None stands for any, the batch."""
    if x.dim() != len(sizes) or any(size not in (None, actual) for size, actual in zip(sizes, x.shape, strict=True)):
        expected = ", ".join("batch" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but the network was exported with ({expected}); {_REMEDY}"
        )


@staged
def require_equal(value: object, expected: object, name: str) -> None:
    """Raise ValueError unless an input that is no tensor has the value that the graph has taken over."""
    if isinstance(value, Tensor) or type(value) is not type(expected) or value != expected:
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is {shown}, but the network was exported with {expected!r}; {_REMEDY}")


@staged
def require_full_precision() -> None:
    """Raise ValueError under autocast: the model has regions without it, which a graph runs in the surrounding precision."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ValueError("the model switches autocast off in places, which its graph cannot; train it without autocast")


REQUIREMENTS = {require_sizes, require_equal, require_full_precision}
