"""Which entries of a result depend on which entries of the operands, told by an operation's own tangent rule.

J r and J (r ⊙ c), for a random r and a number c for each entry of the operands, give the number of every entry of the result:
their ratio. It is not whole where several numbers meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.containers import tensors_in
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.tangents import FREE, JOINED, UNOWNED, ZERO, Owners
from fxstn.rules import RULES, apply_rule

OF_DATA = {"linear", "pointwise", "additive", "bilinear"}  # kinds of rules whose first argument may as well be real
CODES = {UNOWNED: 0.0, JOINED: 0.3716}  # number n has the code n + 1
CLOSE = 1e-3
Structure = Any  # a tensor, a tangent or several of them, as an operation takes and returns them


@dataclass(frozen=True)
class Operand:
    """A tensor among the arguments of an operation.

    path: its position, and within a list its position there; (name,) of a keyword.
    owners: None where it depends on no example.
    varies: whether it has a tangent.
    """

    path: tuple
    value: Tensor
    owners: Owners | None
    varies: bool


def is_real(x: Tensor) -> bool:
    """Whether entries of a value are data, not indices or a mask."""
    return x.is_floating_point() or x.is_complex()


def argument_key(value: object, of_tensor: Callable[[Tensor], Hashable]) -> Hashable:
    """Arguments as a key, tensors by what is said of them."""
    if isinstance(value, Tensor):
        return ("tensor", of_tensor(value))
    if isinstance(value, (tuple, list)):
        return (type(value), *(argument_key(entry, of_tensor) for entry in value))
    if isinstance(value, dict):
        return tuple((name, argument_key(entry, of_tensor)) for name, entry in value.items())
    if isinstance(value, slice):
        return ("slice", *(argument_key(entry, of_tensor) for entry in (value.start, value.stop, value.step)))
    return (type(value), value) if isinstance(value, Hashable) else repr(value)


def ratios(
    function: Callable[..., Any], args: tuple, kwargs: dict, numbers: dict[int, Tensor]
) -> tuple[Any, list[Tensor | None]] | None:
    """(y, of each tensor in it the ratio J (r ⊙ c) / J r, NaN where J r is zero; None where it has no tangent).

    numbers: {id of an operand: what its entries are numbered by}.

    Returns None where the operation has no rule, or its rule fails on real numbers.
    """
    rule = RULES.get(function)
    data = rule is not None and rule.kind in OF_DATA

    def split(value: object, first: bool) -> tuple[Any, Any, Any]:
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            several = [split(entry, first) for entry in value]
            if not several:
                return value, ZERO, ZERO
            kind: Structure = list if isinstance(value, list) else tuple
            wide, first_tangents, others = (kind(part) for part in zip(*several, strict=True))
            return wide, first_tangents, others
        if not isinstance(value, Tensor):
            return value, ZERO, ZERO
        own = numbers.get(id(value))
        wide = _wide(value, random=own is not None and first and data)
        if own is None or not is_real(wide):
            return wide, ZERO, ZERO
        r = torch.empty(value.shape, dtype=torch.float64, device=value.device).uniform_(0.5, 1.5) * (own != FREE)
        codes = (own + 1).double()
        for number, code in CODES.items():
            codes = torch.where(own == number, code, codes)
        return wide, r.to(wide.dtype), (r * codes).to(wide.dtype)

    device = next((x.device.type for x in tensors_in((args, kwargs))), "cpu")
    try:
        with torch.no_grad(), forked_rng(), torch.autocast(device, enabled=False):
            reseed()
            wide, *tangents = zip(*(split(value, i == 0) for i, value in enumerate(args)), strict=True)
            named = {name: split(value, False) for name, value in kwargs.items()}
            keywords = {name: entry[0] for name, entry in named.items()}
            y, first = apply_rule(function, tangents[0], wide, keywords, {n: entry[1] for n, entry in named.items()})
            _, other = apply_rule(function, tangents[1], wide, keywords, {n: entry[2] for n, entry in named.items()})
    except Exception:
        return None
    return y, [_ratio(*pair) for pair in zip(*(_entries(dy, y) for dy in (first, other)), strict=True)]


def _wide(x: Tensor, random: bool) -> Tensor:
    if x.is_complex():
        return x.detach().to(torch.complex128)
    if x.is_floating_point():
        return x.detach().double()
    return torch.rand(x.shape, dtype=torch.float64, device=x.device) if random else x


def _entries(dy: Structure, y: Structure) -> list:
    """The tangent of each tensor in y."""
    results = list(tensors_in(y))
    if isinstance(y, Tensor):
        return [dy]
    return list(dy) if isinstance(dy, (tuple, list)) else [ZERO] * len(results)


def _ratio(first: Structure, other: Structure) -> Tensor | None:
    if other is ZERO or not isinstance(first, Tensor) or not is_real(first):  # no tangent, or that of a mask
        return None
    size = first.abs()
    depends = size > 1e-12 * size.max() if size.numel() else size.bool()
    ratio = torch.where(depends, other / torch.where(depends, first, 1), math.nan)
    return ratio.real if ratio.is_complex() else ratio


def decode(ratio: Tensor, count: int) -> Tensor:
    """The number behind each ratio, below count; FREE, UNOWNED or JOINED."""
    code = ratio.round()
    whole = ((ratio - code).abs() < CLOSE) & (code >= 0) & (code <= count)
    numbers = torch.where(code == 0, UNOWNED, code - 1).nan_to_num(0).long()
    return torch.where(ratio.isnan(), FREE, torch.where(whole, numbers, JOINED))


def compress(numbers: Tensor, count: int) -> Tensor:
    """The numbers with every dimension of size 1 along which they are the same.

    An entry without one takes that of the others along a dimension, unless this is the only one left and does not show all.
    """
    for dim in reversed(range(numbers.dim())):
        if numbers.shape[dim] <= 1:
            continue
        free = numbers == FREE
        high = numbers.masked_fill(free, -count - 4).amax(dim, keepdim=True)
        low = numbers.masked_fill(free, count + 4).amin(dim, keepdim=True)
        if not bool(((low == high) | (low > count)).all()):
            continue
        reduced = high.masked_fill(low > count, FREE)
        filled = bool((free & (reduced != FREE)).any())
        last = reduced.numel() == 1
        if filled and last and count > 1:
            continue
        numbers = reduced
    return numbers


def rows_of(codes: Tensor | None, count: int) -> tuple[tuple[int, Tensor | None], bool] | None:
    """((axis, row of each position along it), whether each entry has one); None where rows meet, or there is no tangent."""
    if codes is None:
        return None
    numbers = decode(codes, count)
    full = not bool((numbers == FREE).any())
    numbers = compress(numbers, count)
    axes = [axis for axis, size in enumerate(numbers.shape) if size > 1]
    if bool((numbers < FREE).any()) or len(axes) > 1:
        return None
    axis, rows = (axes or [0])[0], numbers.flatten().clamp(min=0)
    in_order = len(rows) == count and bool((rows == torch.arange(count, device=rows.device)).all())
    return ((axis, None if in_order else rows), full) if numbers.dim() else None
