"""What becomes of one axis of an operand: an axis of the result, or one that it is summed along with another operand.

An operation that treats the entries along an axis apart passes a scale of the operand on to its result: f(…, s ⊙ R, …) =
s ⊙ f(…, R, …). Where it sums along the axis, the scale can go to the other factor: (s ⊙ R) · x = R · (s ⊙ x).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxstn.ir.grouped import grouped_product
from fxstn.rules.registry import RULES

Path = tuple[int, ...]  # of an argument: its position, and within a list its position there


@dataclass(frozen=True)
class AxisUse:
    """What an operation does with one axis of an operand.

    role: how it reads a parameter: "weight", "table", "factor" or "term".
    dim: dimension of the result, counted from either end, that the axis becomes; where `partner` is not None, dimension of
        that operand along which the axis is summed.
    partner: path of the other operand.
    vector: path of an operand after which the count from the end is one less if it is a vector; None for none.
    """

    role: str
    dim: int
    partner: Path | None = None
    vector: Path | None = None

    def dimension(self, args: tuple) -> int:
        """The dimension of the axis in a result, which is one less from the end beside a vector.

        args: of the operation, with values.
        """
        vector: Any = args
        for position in self.vector or ():
            vector = vector[position]
        return self.dim + (self.vector is not None and vector.dim() == 1 and self.dim < 0)


Finder = Callable[[tuple, Path, int, int], AxisUse | None]  # (arguments, path, axis, rank of the operand)
FINDERS: dict[Callable[..., object], Finder] = {}


def axis_use(function: Callable[..., object], args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """What becomes of an axis of the operand at a path, of which the rank is known; None where that is not known.

    args: of the operation, of any type.
    axis: from 0 to rank - 1.
    """
    if function in FINDERS:
        return FINDERS[function](args, path, axis, rank)
    rule = RULES.get(function)
    if rule is not None and rule.elementwise > path[0] and len(path) == 1:
        return AxisUse("factor" if rule.kind == "bilinear" else "term", axis - rank)
    return None


def finds(*functions: Callable[..., object]) -> Callable[[Finder], Finder]:
    def enter(finder: Finder) -> Finder:
        FINDERS.update(dict.fromkeys(functions, finder))
        return finder

    return enter


@finds(operator.matmul, torch.mm, torch.bmm, torch.mv)
def _of_product(args: tuple, path: Path, axis: int, rank: int) -> AxisUse:
    other: Path = (1 - path[0],)
    if path == (1,):
        if axis == max(0, rank - 2):
            return AxisUse("weight", -1, other)
        return AxisUse("weight", -1) if axis == rank - 1 else AxisUse("weight", axis - rank, vector=other)
    if axis == rank - 1:
        return AxisUse("weight", -2, other, vector=other)
    return AxisUse("weight", axis - rank, vector=other)


@finds(grouped_product)
def _of_groups(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """A matrix for each group of rows: the groups have no axis of the result."""
    if path == (1,) and rank == 3 and axis:
        return AxisUse("weight", -1, (0,) if axis == 1 else None)
    return None


@finds(torch.inner)
def _of_inner(args: tuple, path: Path, axis: int, rank: int) -> AxisUse:
    if axis == rank - 1:
        return AxisUse("weight", -1, (1 - path[0],))
    return AxisUse("weight", axis - rank + 1 if path == (1,) else axis)


@finds(torch.dot)
def _of_dot(args: tuple, path: Path, axis: int, rank: int) -> AxisUse:
    return AxisUse("weight", 0, (1 - path[0],))


@finds(torch.outer)
def _of_outer(args: tuple, path: Path, axis: int, rank: int) -> AxisUse:
    return AxisUse("factor", -path[0])


@finds(F.linear)
def _of_linear(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """A learned input of a layer, or a vector for its weight; matrices and biases have roles of their own."""
    if path == (1,):
        return AxisUse("weight", -1, (0,)) if rank == 1 else None
    if path != (0,):
        return None
    return AxisUse("term", -1, (1,)) if axis == rank - 1 else AxisUse("term", axis)


@finds(torch.tensordot)
def _of_tensordot(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    dims = args[2] if len(args) > 2 else 2
    if isinstance(dims, int):
        own = list(range(rank - dims, rank) if path == (0,) else range(dims))
        others = list(range(dims) if path == (0,) else range(-dims, 0))
    elif isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(d, (list, tuple)) for d in dims):
        own = [d % rank for d in dims[path[0]]]
        others = list(dims[1 - path[0]])
    else:
        return None
    if axis in own:
        return AxisUse("weight", others[own.index(axis)], (1 - path[0],))
    free = [i for i in range(rank) if i not in own]
    return AxisUse("weight", free.index(axis) - (len(free) if path == (1,) else 0))


@finds(torch.einsum)
def _of_einsum(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    if not isinstance(args[0], str):
        return None
    terms, result = _letters(args[0])
    nested = len(path) == 2
    number = path[1] if nested else path[0] - 1
    letter = _letter_at(terms[number], axis, rank)
    if letter is None:  # in the ellipsis
        if "..." not in result:
            return None
        behind = rank - len(terms[number].partition("...")[2]) - axis
        return AxisUse("factor", -len(result.partition("...")[2]) - behind)
    if terms[number].count(letter) > 1:
        return None
    sharing = [i for i, term in enumerate(terms) if i != number and term.count(letter) == 1]
    if letter in result:
        return AxisUse("factor" if sharing else "weight", _place_of(letter, result))
    varying = [i for i in sharing if isinstance(args[1][i] if nested else args[1 + i], (fx.Node, torch.Tensor))]
    if not varying:
        return None
    return AxisUse(
        "weight", _place_of(letter, terms[varying[0]]), (path[0], varying[0]) if nested else (1 + varying[0],)
    )


def _letters(equation: str) -> tuple[list[str], str]:
    """(letters of each operand, letters of the result) of an equation of torch.einsum."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        single = sorted({c for c in left if c.isalpha() and left.count(c) == 1})
        result = ("..." if "..." in left else "") + "".join(single)
    return terms, result


def _letter_at(term: str, axis: int, rank: int) -> str | None:
    """The letter of an axis; None in the ellipsis."""
    before, dots, after = term.partition("...")
    if axis < len(before):
        return before[axis]
    return after[axis - rank] if axis >= rank - len(after) and dots else None


def _place_of(letter: str, term: str) -> int:
    """The dimension of a letter: from the start where it is before the ellipsis, else from the end."""
    before, _, after = term.partition("...")
    return before.index(letter) if letter in before else after.index(letter) - len(after)


@finds(operator.getitem)
def _of_lookup(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """Rows that are picked by computed indices: the axes behind them stay as they are."""
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    plain = all(isinstance(index, (int, slice, fx.Node, torch.Tensor)) for index in indices)
    return AxisUse("table", axis - rank) if path == (0,) and plain and axis >= len(indices) else None


@finds(torch.index_select)
def _of_selection(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    return AxisUse("table", axis) if path == (0,) and axis != args[1] % rank else None


@finds(operator.pow)
def _of_power(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    return AxisUse("factor", axis - rank)


@finds(torch.where)
def _of_choice(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    return AxisUse("term", axis - rank) if path in ((1,), (2,)) else None


@finds(torch.cat)
def _of_join(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    dim = args[1] if len(args) > 1 else 0
    return AxisUse("term", axis - rank) if path[0] == 0 and isinstance(dim, int) and axis != dim % rank else None


@finds(F.scaled_dot_product_attention)
def _of_attention(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """Heads stay apart; so do the queries, of which each has a row of its own in the mask."""
    last = -2 if path in ((0,), (3,)) else -3
    return AxisUse("term", axis - rank) if axis - rank <= last else None


@finds(F.prelu)
def _of_prelu(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    return AxisUse("factor", 1) if path == (1,) else None


@finds(torch.cdist)
def _of_distance(args: tuple, path: Path, axis: int, rank: int) -> AxisUse | None:
    """Distances to the rows of a codebook."""
    if axis == rank - 1:
        return None
    return AxisUse("table", axis - rank + (axis == rank - 2 and path == (1,)))
