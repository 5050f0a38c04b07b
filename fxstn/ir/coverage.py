"""Which weights of a network respond to its hyperparameters, of those that could."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

NORMED = "a batch norm after it takes its scale away"  # why a weight that is only scaled is left out on purpose


@contextmanager
def shown() -> Iterator[None]:
    """Inside, no warning that few weights respond: who shows the coverage anyway says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ weights respond")
        yield


@dataclass(frozen=True)
class Weight:
    """A weight that does not respond.

    name: of the parameter. reason: why.
    """

    name: str
    elements: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Weights that respond, of those that could: the trainable parameters of two or more dimensions that the forward reads.

    These are matrices, kernels, tables and position embeddings. print() says how many they are.

    responding, possible: numbers of parameters.
    responding_elements, possible_elements: numbers of their entries.
    lost: those that could and do not respond, the largest first.
    omitted: weights before a batch norm. Their scale has no effect, so that response="scaled" leaves them out on purpose; the
        affine parameters of the norm respond in their place. They are not among those that could.
    """

    responding: int = 0
    possible: int = 0
    responding_elements: int = 0
    possible_elements: int = 0
    lost: tuple[Weight, ...] = ()
    omitted: tuple[Weight, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, responding: Container[str], obstacles: Mapping[str, str]) -> Coverage:
        """The coverage of a model.

        responding: names of the parameters that respond.
        obstacles: {name of a parameter that does not: why}; the forward does not read the others.
        """
        moved: list[int] = []
        others: list[Weight] = []
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or not parameter.requires_grad or not parameter.numel():
                continue
            if name in responding:
                moved.append(parameter.numel())
            elif name in obstacles:
                others.append(Weight(name, parameter.numel(), obstacles[name]))
        others.sort(key=lambda weight: -weight.elements)
        lost = tuple(weight for weight in others if weight.reason != NORMED)
        omitted = tuple(weight for weight in others if weight.reason == NORMED)
        elements = sum(moved) + sum(weight.elements for weight in lost)
        return cls(len(moved), len(moved) + len(lost), sum(moved), elements, lost, omitted)

    @property
    def share(self) -> float:
        """Of the elements that could respond, those that do, in [0, 1]; 1 where none could."""
        return self.responding_elements / self.possible_elements if self.possible_elements else 1.0

    def named(self, most: int = 3) -> str:
        """The largest weights that do not respond, and why."""
        return "; ".join(f"'{w.name}' ({w.elements:,} elements): {w.reason}" for w in self.lost[:most])

    def __str__(self) -> str:
        verb = "responds" if self.responding == 1 else "respond"
        if not self.omitted:
            return f"{self.responding} of {self.possible} weights {verb}, {self.share:.1%} of their elements"
        left_out = sum(weight.elements for weight in self.omitted)
        weights, elements = self.possible + len(self.omitted), self.possible_elements + left_out
        text = f"{self.responding} of {weights} weights {verb}, {self.responding_elements:,} of {elements:,} elements"
        if self.lost:
            could = self.possible_elements - self.responding_elements
            text += f"; {len(self.lost)} could and {'does' if len(self.lost) == 1 else 'do'} not ({could:,} elements)"
        be = "is" if len(self.omitted) == 1 else "are"
        return f"{text}; {len(self.omitted)} {be} left out on purpose ({left_out:,} elements): {NORMED}"
