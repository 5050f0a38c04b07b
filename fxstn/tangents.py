"""What a tangent can be besides a tensor: the symbolic zero, and the structured tangent of a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx.node import map_aggregate


class SymbolicZero:
    """The tangent of a value that does not depend on the weights. Costs nothing: no node is emitted for it."""

    def __repr__(self) -> str:
        return "ZERO"


ZERO = SymbolicZero()


@dataclass(frozen=True)
class Scaled:
    """Tangent of a parameter: `response` with every row multiplied by its entry of `scale` (paper, Eq. 3.14).

    scale: (rows,) for one perturbation of the whole batch, or (batch, rows). response: shaped like the parameter.
    Never materialised per example; the rules of linear and convolution consume it as it is.
    """

    scale: Any
    response: Any


def all_zero(tangents: Any) -> bool:
    """True when a nested structure of tangents holds nothing but ZERO (and non-tangents)."""
    found = False

    def visit(leaf: Any) -> Any:
        nonlocal found
        found = found or leaf is not ZERO
        return leaf

    map_aggregate(tangents, visit)
    return not found
