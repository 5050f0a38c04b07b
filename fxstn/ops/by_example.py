"""Values that all examples of a batch share, where a perturbation per example moves them: one for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxstn.ir.staging import staged
from fxstn.ir.tangents import SHARED, BatchAxis
from fxstn.ops.batch_axis import factors


class ByExample(NamedTuple):
    """One value for each example, (batch, ...), in place of a value (...) that all share."""

    rows: Tensor


def _is_leaf(value: object) -> bool:
    return isinstance(value, ByExample)


def _mapped(change: Callable[[Any], object], value: object) -> Any:
    return tree_map(change, value, is_leaf=_is_leaf)


@staged
def by_example(scale: Tensor) -> Tensor | ByExample:
    """The scales of a layer whose output all examples share: one layer for each row.

    scale: (n,), or (batch, n) with a row per example.
    """
    return ByExample(scale) if scale.dim() > 1 else scale


@staged
def mean_of_examples(value: object) -> object:
    """A result that all examples share, which is no other for each: the mean of what it would be."""
    return _mapped(lambda leaf: leaf.rows.mean(0) if isinstance(leaf, ByExample) else leaf, value)


@staged
def of_one_example(value: object) -> object:
    """The value as one example has it, for its sizes."""
    return _mapped(lambda leaf: leaf.rows[0] if isinstance(leaf, ByExample) else leaf, value)


@dataclass(frozen=True)
class EachExample:
    """An operation on values of which some are one for each example: vectorised over the examples.

    operation: of the operands. Its result is a tensor or a structure of them.
    places: of each operand, where the examples are in it; SHARED where they are not, None where it is no tensor.
    place: the same of the result.
    divided: position of an operand that counts rows of the result, as the size that `Tensor.expand` is given; or None.
    """

    operation: Callable[..., Any]
    places: tuple[BatchAxis | None, ...]
    place: BatchAxis
    divided: int | None = None

    def __call__(self, *operands: Any) -> Any:
        leaves: list[object] = []
        _mapped(leaves.append, operands)
        batch = next((leaf.rows.shape[0] for leaf in leaves if isinstance(leaf, ByExample)), None)
        if batch is None:
            return self.operation(*operands)
        if self.divided is not None:
            number = operands[self.divided] // batch
            operands = (*operands[: self.divided], number, *operands[self.divided + 1 :])
        exposed = [self._exposed(x, place, batch) for x, place in zip(operands, self.places, strict=True)]
        along = tuple(_mapped(lambda leaf: 0 if isinstance(leaf, ByExample) else None, x) for x in exposed)
        plain = tuple(_mapped(lambda leaf: leaf.rows if isinstance(leaf, ByExample) else leaf, x) for x in exposed)
        result = torch.vmap(self.operation, in_dims=along, randomness="same")(*plain)
        return tree_map(lambda leaf: self._joined(leaf, batch), result)

    def _exposed(self, value: object, place: BatchAxis | None, batch: int) -> object:
        """The share of each example in a value that has rows of all."""
        if place is None or place == SHARED:
            return value

        def expose(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            axis, (left, right) = place.axis, factors(leaf.shape[place.axis], batch, place)
            return ByExample(
                leaf.unflatten(axis, (left, batch, right)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)
            )

        return _mapped(expose, value)

    def _joined(self, rows: Tensor, batch: int) -> Tensor | ByExample:
        """The result of all examples in one value, where it has rows of them."""
        if self.place == SHARED:
            return ByExample(rows)
        axis, created = self.place.axis, self.divided is None and all(p in (None, SHARED) for p in self.places)
        if created:  # each example has made the rows of all
            left, right = factors(rows.shape[axis + 1], batch, self.place)
            own = rows.unflatten(axis + 1, (left, batch, right)).diagonal(dim1=0, dim2=axis + 2)
            return own.movedim(-1, axis + 1).flatten(axis, axis + 2)
        left, right = factors(rows.shape[axis + 1] * batch, batch, self.place)
        return rows.unflatten(axis + 1, (left, right)).movedim(0, axis + 1).flatten(axis, axis + 2)


def each_example(
    function: Callable[..., Any],
    operation: Callable[..., Any],
    places: Sequence[BatchAxis | None],
    place: BatchAxis,
    divided: int | None = None,
) -> Callable[..., Any]:
    """A staged `EachExample`.

    function: the operation of the graph that it does, whose effects it has.
    """
    each = EachExample(operation, tuple(places), place, divided)

    def run(*operands: Any) -> Any:
        return each(*operands)

    run.__name__ = f"{getattr(function, '__name__', 'operation')}_by_example"
    return staged(derivative_of=function)(run)
