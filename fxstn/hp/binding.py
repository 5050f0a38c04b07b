"""Which λ belongs where in a model: the result of matching specs with a training graph."""

from __future__ import annotations

from dataclasses import dataclass

from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.specs import Spec
from fxstn.hp.terms import LossTerms


@dataclass(frozen=True)
class Site:
    """Where the training graph reads λ[indices], the strengths of one operation.

    node: the operation that is taken over; with insert=True, the value after which an operation is inserted.
    spec: whose operation it is; that of `hp.Dropout` depends on the node that is taken over.
    outside: an inserted operation acts for the readers outside this module call, by number; None: for all readers.
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
    """What is tuned, and where it acts.

    hyperparameters: what is tuned, in the order of λ.
    sites: where the graph reads it.
    dropped: (parameter name, index of its DropConnect rate).
    auxiliary: sites whose values the training objectives read beside the output, in the order they act.
    terms: what else those objectives have.
    """

    hyperparameters: tuple[Hyperparameter, ...]
    sites: tuple[Site, ...]
    dropped: tuple[tuple[str, int], ...]
    auxiliary: tuple[Site, ...]
    terms: LossTerms

    def uses(self) -> list[list[str]]:
        """What each hyperparameter acts on, as texts; [] of one that the loss function reads."""
        result: list[set[str]] = [set() for _ in self.hyperparameters]
        for site in self.sites:
            for index in site.indices:
                result[index].add(f"{type(site.spec).__name__} at {site.path!r}")
        for name, index, norm in self.terms.penalties:
            result[index].add(f"decay in the {norm}-norm of {name}")
        for name, index in self.dropped:
            result[index].add(f"DropConnect of {name}")
        for index, _ in self.terms.jacobian:
            result[index].add("JacobianNorm")
        return [sorted(texts) for texts in result]


NOTHING_BOUND = Binding((), (), (), (), LossTerms((), (), ()))
