"""What a tangent can be besides a tensor: the symbolic zero, and the structured tangent of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class SymbolicZero:
    """The tangent of a value that does not depend on the weights. Costs nothing: no node is emitted for it."""

    def __repr__(self) -> str:
        return "ZERO"


ZERO = SymbolicZero()


class BatchAxis(NamedTuple):
    """Where the examples of a batch are: dimension `axis`, of size left · batch · right with the examples in the middle.

    (0, 1, 1) is a plain batch; (0, 1, windows) has windows folded into it behind the examples; (0, time, 1) is a
    time-major value with both flattened.
    """

    axis: int = 0
    left: int = 1
    right: int = 1


BATCH_FIRST = BatchAxis()
SHARED = BatchAxis(-1, 0, 0)  # nowhere: the value depends on no example, and all of them read it
BatchAxes = Mapping[
    str, BatchAxis | None
]  # by node name; None: no single place. A name that is missing: a plain batch.


# In place of the number of an example: the entry depends on none; on weights, but on no example; on several examples.
FREE, UNOWNED, JOINED = -1, -2, -3


@dataclass(frozen=True, eq=False)
class Owners:
    """Which example each entry of a value belongs to, where a run finds it out: rows may have been picked in any order.

    numbers: of the examples, or one of FREE, UNOWNED and JOINED; whole numbers that broadcast with the value, of as many
        dimensions.
    """

    numbers: Tensor


Place = BatchAxis | Owners
WHOLE = -1  # in place of an axis: one scale for all of a parameter


@dataclass(frozen=True)
class Scaled:
    """Tangent of a parameter, or of a value computed from it row by row: `response` times `scale` along `axis` (Eq. 3.14).

    It is never materialised per example. The rules of the layers take it as it is.

    scale: (n,) for one perturbation of the whole batch, or (batch, n). A tensor or a proxy, as `response`.
    response: shaped like the value, n entries along `axis`; WHOLE: n is 1.
    batch_axis: where the examples are in the output of the operation that takes it; Owners in a forward that runs as it is.
    rank: number of dimensions of the value, where a pass knows it.
    """

    scale: Any
    response: Any
    axis: int = 0
    batch_axis: Place = BATCH_FIRST
    rank: int = 0


@dataclass(frozen=True)
class ScaledParts:
    """Tangent of a value computed from parameters alone: a sum of parts, each scaled along an axis of its own.

    parts: None for one that is zero.
    """

    parts: tuple[Scaled | None, ...]


def all_zero(tangents: object) -> bool:
    """Whether all leaves of a nested structure of tangents are ZERO."""
    if isinstance(tangents, (tuple, list)):
        return all(map(all_zero, tangents))
    if isinstance(tangents, dict):
        return all(map(all_zero, tangents.values()))
    if isinstance(tangents, slice):
        return all(map(all_zero, (tangents.start, tangents.stop, tangents.step)))
    return tangents is ZERO
