"""The types of what a forward returns, for a graph that returns the leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxstn.ir.containers import Kinds, mapped


@dataclass(frozen=True)
class Slot:
    """Where the leaf with this number belongs."""

    number: int


@dataclass(frozen=True)
class OutputTypes:
    """An output with a `Slot` in place of each leaf.

    name: of the output's type.
    """

    template: object
    name: str

    @classmethod
    def of(cls, output: object, values: Kinds) -> OutputTypes:
        """values: types of the leaves that make an object worth opening, see `mapped`."""
        numbers = itertools.count()
        return cls(mapped(lambda _: Slot(next(numbers)), output, values), type(output).__name__)

    def restored(self, values: Sequence[object]) -> Any:
        """The output with these leaves."""
        return mapped(lambda slot: values[slot.number], self.template, Slot)
