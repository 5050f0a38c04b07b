"""Which λ belongs where in a model: what matching specs with a training graph finds."""

from __future__ import annotations

from dataclasses import dataclass

from fxstn.hp.bijection import Quantity
from fxstn.hp.specs import Spec
from fxstn.hp.terms import LossTerms


@dataclass(frozen=True)
class Site:
    """Where the training graph reads λ[indices], the strengths of one operation.

    node: the operation that is taken over; or, with insert=True, the value that gets one of its own, for those of its
    readers that lie outside module call number `outside` (None: for all of them). spec: whose operation; `hp.Dropout`'s
    depends on the node that is taken over.
    """

    indices: tuple[int, ...]
    path: str
    node: str
    spec: Spec
    insert: bool = False
    outside: int | None = None

    @property
    def index(self) -> int:
        """The one strength of a dropout or a penalty."""
        (index,) = self.indices
        return index


@dataclass(frozen=True)
class Binding:
    """quantities: what is tuned, in the order of λ. sites: where the graph reads it. dropped: (parameter name, index of its
    DropConnect rate). auxiliary: sites whose values the training objectives read beside the output, in the order they act.
    terms: what else those objectives have."""

    quantities: tuple[Quantity, ...]
    sites: tuple[Site, ...]
    dropped: tuple[tuple[str, int], ...]
    auxiliary: tuple[Site, ...]
    terms: LossTerms
