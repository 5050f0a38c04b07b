"""One operation that reads values which all examples share, where each example has a perturbation of its own.

Their tangents are structured: s ⊙ R as long as an axis is kept, or one tangent for each example. Where the operation reads a
value with owners, too, each entry of the result takes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxstn.frontends.live.duals import Duals, RuleResult
from fxstn.frontends.live.links import Step
from fxstn.frontends.live.owners import ENTRYWISE, Locator, Unlocated
from fxstn.frontends.live.ratios import Operand, Structure
from fxstn.ir.containers import arguments_mapped, tensors_in
from fxstn.ir.errors import operation_name
from fxstn.ir.spelling import Spelled
from fxstn.ir.tangents import WHOLE, ZERO, Owners, Place, Scaled, ScaledParts
from fxstn.ops.batch_axis import picked_rows
from fxstn.ops.response import align
from fxstn.rules import RULES, apply_rule, kind_of
from fxstn.rules.operand_axes import axis_use


@dataclass(frozen=True, eq=False)
class OfExamples:
    """The tangent of a value that all examples share: one for each, (batch, ...)."""

    rows: Tensor


Shared = (Scaled, ScaledParts, OfExamples)


class SharedOperation:
    """One operation that reads values which all examples share, and whose tangents are structured."""

    def __init__(self, duals: Duals, locator: Locator, spelled: Spelled, operands: Sequence[Operand]) -> None:
        self.duals, self.locator, self.function, self.operands = duals, locator, spelled.function, operands
        self.shared = [operand for operand in operands if isinstance(duals.tangent(operand.value), Shared)]
        self.originals: dict[int, Tensor] = {}

        def alias(x: Tensor) -> Tensor:
            copy = x.data
            self.originals[id(copy)] = x
            return copy

        self.args = tuple(arguments_mapped(alias, value) for value in spelled.args)
        self.kwargs = {name: arguments_mapped(alias, value) for name, value in spelled.kwargs.items()}
        self.duals.note(
            operation_name(self.function), kind_of(self.function, map(duals.tangent, (o.value for o in self.shared)))
        )

    def value(self, operand: Operand) -> Any:
        return _at(self.args, self.kwargs, operand.path)

    def apply(self, tangents: dict[tuple, Any], args: tuple | None = None) -> tuple[Any, Any]:
        """(y, dy) where the operands at these paths have these tangents, and no others."""

        def fill(value: object, path: tuple) -> Any:
            if path in tangents:
                return tangents[path]
            if isinstance(value, (tuple, list)) and any(other[: len(path)] == path for other in tangents):
                return type(value)(fill(entry, (*path, i)) for i, entry in enumerate(value))
            return ZERO

        args = self.args if args is None else args
        named = {name: fill(value, (name,)) for name, value in self.kwargs.items()}
        return apply_rule(self.function, tuple(fill(v, (i,)) for i, v in enumerate(args)), args, self.kwargs, named)

    def of_shared(self) -> RuleResult:
        """What is computed from shared values alone: a structured tangent where an axis is kept, one for each example else."""
        y: Structure = None
        parts: list[list[Scaled]] = []
        rows: list[list[Tensor]] = []
        for operand in self.shared:
            tangent = self.duals.tangent(operand.value)
            for part in _parts(tangent):
                y, dy = self.apply({operand.path: part.response})
                parts = parts or [[] for _ in tensors_in(y)]
                rows = rows or [[] for _ in tensors_in(y)]
                places = self._places(operand, part, y)
                if all(
                    entry is not None or not isinstance(d, Tensor)
                    for entry, d in zip(places, _several(dy, y), strict=True)
                ):
                    for own, entry, d in zip(parts, places, _several(dy, y), strict=True):
                        own += [_moved(part, entry, d)] if isinstance(d, Tensor) and entry is not None else []
                else:
                    self._add_rows(rows, operand, _rows_of_part(part), y)
            if isinstance(tangent, OfExamples):
                y, _ = self.apply({operand.path: tangent.rows[0]})
                parts = parts or [[] for _ in tensors_in(y)]
                rows = rows or [[] for _ in tensors_in(y)]
                self._add_rows(rows, operand, tangent.rows, y)
        tangents = [_joined(own, several) for own, several in zip(parts, rows, strict=True)]
        dy = tangents[0] if isinstance(y, Tensor) else tuple(tangents) or ZERO
        return RuleResult(y, dy, self.originals, None)

    def _places(self, operand: Operand, part: Scaled, y: Structure) -> list:
        if part.scale.shape[-1] == 1:
            return [(WHOLE, None)] * len(list(tensors_in(y)))
        value = self.value(operand)
        return self.locator.rows_after(
            self.function, self.args, self.kwargs, operand.path, value, part.axis % value.dim(), y
        )

    def _add_rows(self, rows: list[list[Tensor]], operand: Operand, tangents: Tensor, y: Structure) -> None:
        for own, several in zip(rows, _several(self._each(operand, tangents), y), strict=True):
            own += [several] if isinstance(several, Tensor) else []

    def _each(self, operand: Operand, tangents: Tensor) -> Any:
        """dy for each of several tangents of one operand, (batch, ...)."""

        def of_one(row: Tensor) -> Any:
            return self.apply({operand.path: row})[1]

        try:
            return torch.vmap(of_one, randomness="same")(tangents)
        except (RuntimeError, ValueError):  # what vmap does not know, or a tangent that is zero: one after the other
            several = [of_one(row) for row in tangents]
        if several[0] is ZERO:
            return ZERO
        if isinstance(several[0], Tensor):
            return torch.stack(several)
        return tuple(torch.stack(own) if isinstance(own[0], Tensor) else ZERO for own in zip(*several, strict=True))

    def of_rows(self, results: Sequence[Owners | None]) -> RuleResult:
        """What reads values with owners besides. results: owners of what it returns."""
        owners = results[0]
        assert owners is not None
        place, joins = self.locator.place(owners), self.locator.joins(owners)
        rule, rank = RULES.get(self.function), owners.numbers.dim()
        main: dict[tuple, Any] = {
            operand.path: tangent
            for operand in self.operands
            if isinstance(tangent := self.duals.tangent(operand.value), Tensor)
        }
        terms: list[Callable[[], Any]] = []
        structured = False
        for operand in self.shared:
            tangent, position = self.duals.tangent(operand.value), operand.path[0]
            if joins and operand.value.numel() > 1:
                what = f"{operation_name(self.function)} reads weights and a value in which examples meet"
                raise Unlocated(self.duals.path, what)
            if self.function in ENTRYWISE or (
                isinstance(position, int) and rule is not None and rule.elementwise > position
            ):
                main[operand.path] = self._tangent_rows(tangent, operand, owners, rank)
                continue
            reads = rule.reads.get(position) if rule is not None and len(operand.path) == 1 else None
            for part in _parts(tangent):
                if reads is not None and part.axis in reads.axes and operand.path not in main:
                    main[operand.path], structured = replace(part, batch_axis=place), True
                else:
                    terms.append(self._term(operand, part, results, place))
            if isinstance(tangent, OfExamples):
                terms.append(partial(self._picked, operand, tangent.rows, results))
        y, dy = self.apply(main)
        for term in terms:
            dy = _plus(dy, term())
        step = None if terms or structured else self._step(main)
        return RuleResult(y, dy, self.originals, step)

    def _tangent_rows(self, tangent: Structure, operand: Operand, owners: Owners, rank: int) -> Any:
        """The tangent of an operand that is broadcast to the result, as each row of the result reads it."""
        result: Structure = ZERO
        for part in _parts(tangent):
            response, single = part.response, part.scale.shape[-1] == 1
            dim = -1 if single else part.axis % response.dim() - response.dim()
            term = response * align(part.scale, response.new_empty([1] * rank), dim, owners)
            result = term if result is ZERO else result + term
        if isinstance(tangent, OfExamples):
            result = picked_rows(tangent.rows, owners)
        return result

    def _term(
        self, operand: Operand, part: Scaled, results: Sequence[Owners | None], place: Place
    ) -> Callable[[], Any]:
        """Computes what one part of an operand's tangent gives, beside the rule."""
        use, owners = None, results[0]
        assert owners is not None
        if isinstance(operand.path[0], int) and part.axis != WHOLE:
            use = axis_use(self.function, self.args, operand.path, part.axis % part.response.dim(), part.response.dim())
        if part.scale.shape[-1] == 1 and len(results) == 1:
            like = part.response.new_empty([1] * owners.numbers.dim())
            return lambda: _times(self.apply({operand.path: part.response})[1], align(part.scale, like, -1, owners))
        if use is None:
            return lambda: self._picked(operand, _rows_of_part(part), results)
        if use.partner is None:
            return lambda: _scaled(self.apply({operand.path: part.response})[1], part, use.dimension(self.args), place)
        other = next((o for o in self.operands if o.path == use.partner), None)
        own = None if other is None else other.owners
        if other is None or own is None or self.locator.joins(own):
            return lambda: self._picked(operand, _rows_of_part(part), results)

        def with_partner() -> Any:
            rows = _scaled(self.value(other), part, use.dimension(self.args), self.locator.place(own))
            return self.apply({operand.path: part.response}, _with(self.args, other.path, rows))[1]

        return with_partner

    def _picked(self, operand: Operand, tangents: Tensor, results: Sequence[Owners | None]) -> Any:
        """dy of all examples, of which each entry takes its own. It costs a run of the operation for each example."""
        dy = self._each(operand, tangents)
        if dy is ZERO:
            return ZERO
        if isinstance(dy, Tensor):
            assert results[0] is not None
            return picked_rows(dy, results[0])
        pairs = zip(dy, results, strict=True)
        return tuple(picked_rows(d, own) if isinstance(d, Tensor) and own else ZERO for d, own in pairs)

    def _step(self, main: dict[tuple, Any]) -> Step | None:
        before = {i: step for i, x in self.originals.items() if (step := self.duals.links.find(x))}

        def fill(value: object, path: tuple) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(fill(entry, (*path, i)) for i, entry in enumerate(value))
            return main.get(path, ZERO)

        tangents = tuple(fill(value, (i,)) for i, value in enumerate(self.args))
        named = {name: fill(value, (name,)) for name, value in self.kwargs.items()}
        return Step(self.function, self.args, self.kwargs, tangents, named, before)


def _plus(dy: Structure, more: Structure) -> Any:
    if dy is ZERO or more is ZERO:
        return more if dy is ZERO else dy
    return tuple(map(_plus, dy, more)) if isinstance(dy, (tuple, list)) else dy + more


def _at(args: tuple, kwargs: dict, path: tuple) -> Any:
    value: Structure = kwargs[path[0]] if isinstance(path[0], str) else args[path[0]]
    for position in path[1:]:
        value = value[position]
    return value


def _with(args: tuple, path: tuple, value: object) -> tuple:
    if len(path) == 1:
        return tuple(value if i == path[0] else entry for i, entry in enumerate(args))
    inner = type(args[path[0]])(value if i == path[1] else entry for i, entry in enumerate(args[path[0]]))
    return tuple(inner if i == path[0] else entry for i, entry in enumerate(args))


def _parts(tangent: object) -> tuple[Scaled, ...]:
    if isinstance(tangent, Scaled):
        return (tangent,)
    return tuple(part for part in tangent.parts if part is not None) if isinstance(tangent, ScaledParts) else ()


def _several(dy: Structure, y: Structure) -> list:
    """The tangent of each tensor in y."""
    if isinstance(y, Tensor):
        return [dy]
    return list(dy) if isinstance(dy, (tuple, list)) else [ZERO] * len(list(tensors_in(y)))


def _moved(part: Scaled, place: tuple[int, Tensor | None], response: Tensor) -> Scaled:
    axis, rows = place
    return Scaled(part.scale if rows is None else part.scale[..., rows], response, axis)


def _rows_of_part(part: Scaled) -> Tensor:
    """s ⊙ R of each example, (batch, ...)."""
    response = part.response
    axis = -1 if part.scale.shape[-1] == 1 else part.axis % response.dim()
    shape = [part.scale.shape[-1] if i == axis else 1 for i in range(response.dim())]
    return response * part.scale.to(response.dtype).view(-1, *shape)


def dense_rows(tangent: object) -> list[Tensor]:
    return [tangent.rows] if isinstance(tangent, OfExamples) else [_rows_of_part(part) for part in _parts(tangent)]


def _joined(parts: list[Scaled], rows: list[Tensor]) -> Any:
    """One tangent for the parts of several operands."""
    if rows:
        several = [*rows, *map(_rows_of_part, parts)]
        return OfExamples(sum(several[1:], several[0]))
    if not parts:
        return ZERO
    return parts[0] if len(parts) == 1 else ScaledParts(tuple(parts))


def _scaled(value: Structure, part: Scaled, dim: int, place: Place) -> Structure:
    return _times(value, align(part.scale, value, dim, place)) if isinstance(value, Tensor) else value


def _times(value: Structure, factor: Tensor) -> Structure:
    return value * factor if isinstance(value, Tensor) else value
