"""What the settings of an operation may be: words for the error, and a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fxstn.ir.input_errors import is_number

Check = tuple[str, Callable[[Any], bool]]


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def reals(count: int | None = None, low: float = -math.inf, high: float = math.inf) -> Check:
    """Finite numbers from low to high.

    count: how many. None: one or more.
    """
    ends = "" if low == -high == -math.inf else f" in [{low:g}, {high:g}]"
    return f"a tuple of {count or 'one or more'} numbers{ends}", lambda value: (
        isinstance(value, tuple) and (len(value) == count if count else len(value) > 0)
        and all(_is_finite(x) and low <= x <= high for x in value)
    )  # fmt: skip


def span(low: float, high: float, positive: bool = False) -> Check:
    """A range (a, b), low ≤ a ≤ b ≤ high.

    positive: a is above 0.
    """
    _, is_pair = reals(2, low, high)
    words = f"a range (a, b) with {'0 < a' if positive else f'{low:g} ≤ a'} ≤ b" + f" ≤ {high:g}" * math.isfinite(high)
    return words, lambda value: is_pair(value) and value[0] <= value[1] and (value[0] > 0 or not positive)


def whole(low: int) -> Check:
    """A whole number from low on."""
    return f"a whole number, {low} or more", lambda value: type(value) is int and value >= low


def choice(*values: str) -> Check:
    return f"one of {', '.join(map(repr, values))}", lambda value: value in values


def optional(check: Check) -> Check:
    """None, or what another check says."""
    words, is_right = check
    return f"{words}, or None", lambda value: value is None or is_right(value)


NUMBER: Check = "a finite number", _is_finite
POSITIVE: Check = "a finite number above 0", lambda value: _is_finite(value) and value > 0
FLAG: Check = "True or False", lambda value: isinstance(value, bool)
ODD_SIDES: Check = "a tuple (width, height) of odd numbers", lambda value: (
    reals(2, 1)[1](value) and all(type(side) is int and side % 2 for side in value)
)  # fmt: skip
FILL = optional(reals())
