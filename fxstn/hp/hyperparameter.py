"""One hyperparameter: its start, its range, and the point of the real line where the optimisation of λ starts."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

WHOLE = 2.0**23  # up to it, float32 holds every k + 0.5, where an integer k starts
USUAL, CHOSEN, OWN, DECAY = (
    "the usual recipe",
    "init=",
    "the module's own",
    "the optimizer's weight_decay",
)  # origins of starts
LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32


def _single(value: float) -> float:
    """As float32 has it; infinities stay."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@dataclass(frozen=True)
class Hyperparameter:
    """A number that is tuned: start, range and first perturbation scale.

    init: the start, a number. It must be strictly between low and high; the start of an integer may also be low or high.
    low, high: ends of the range. low=0 with high=inf means any positive number.
    scale: σ at the start, > 0 and finite.
    log: whether the real line is mapped to the logarithm of the range, so that equal steps multiply the value. Needs low > 0.
    integer: whether values are whole numbers, low and high included. The real line is mapped to [low, high + 1), then rounded
        down; a start k is the middle of [k, k + 1).
    by_batch: whether all examples of a batch get the same perturbation.
    regularizes: whether a higher value is a stronger regularisation.
    origin: where the start comes from, in words.
    name: as in `stn.hparams.names`. A spec holds hyperparameters without a name; each match in the model gets a copy with one.

    Raises ValueError when the range is empty, impossible or too large for float32, when the start is outside of the range or,
    for an integer, not a whole number, and when scale is out of range. A hyperparameter without a name is not checked.
    """

    init: float
    low: float
    high: float
    scale: float = 1.0
    log: bool = False
    integer: bool = False
    by_batch: bool = False
    regularizes: bool = True
    origin: str = USUAL
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("init", "low", "high", "scale"):  # NumPy's numbers become Python's
            value = getattr(self, key)
            object.__setattr__(self, key, int(value) if isinstance(value, Integral) else float(value))
        if self.name:  # without a name a start may be outside the range, because a match may bring its own
            self._check()

    def _check(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"{self.name}: low={self.low} is not below high={self.high}; give a range that is not empty"
            )
        if self.integer and not all(math.isinf(end) or end == int(end) for end in (self.low, self.high)):
            raise ValueError(
                f"{self.name}: the range of an integer needs whole ends, got low={self.low}, high={self.high}"
            )
        self._check_float32()
        if not (self.low <= self.init <= self.high if self.integer else self.low < self.init < self.high):
            between = "between" if self.integer else "strictly between"
            raise ValueError(
                f"{self.name}: init={self.init} is not {between} low={self.low} and high={self.high}; "
                "move it inside the range, or widen the range"
            )
        if self.integer and not float(self.init).is_integer():
            raise ValueError(f"{self.name}: init={self.init} must be a whole number, as all values of an integer are")
        if not 2.0**-126 <= self.scale <= LARGEST:
            raise ValueError(f"{self.name}: scale={self.scale} must be positive and finite, in float32")
        if math.isinf(self.low):
            raise ValueError(f"{self.name}: low={self.low} must be finite; only high may be infinite, with low=0")
        if math.isinf(self.high) and self.low != 0:
            raise ValueError(f"{self.name}: a range without upper end must start at low=0, got low={self.low}")
        if self.log and not self.low > 0:
            raise ValueError(f"{self.name}: a logarithmic range needs low > 0, got low={self.low}")

    def _check_float32(self) -> None:
        """Raises ValueError for ends that float32, in which values are computed, cannot hold, or cannot tell apart."""
        largest, what = (WHOLE, "2**23 (8388608), beyond which float32 skips halves") if self.integer else (
            LARGEST, f"{LARGEST:.2g}, the largest number of float32")  # fmt: skip
        low, high = (0.0 if math.isinf(end) else end for end in self.interval)
        if max(abs(low), abs(high), high - low) > largest:
            raise ValueError(f"{self.name}: low={self.low} and high={self.high} must be within {what}, and so must their "
                             "distance; give a narrower range")  # fmt: skip
        if not self.integer and (_single(self.low) == _single(self.high) or (self.log and 0 < self.low < 2.0**-126)):
            text = "cannot be told apart, or told from 0, in float32; give a range nearer to 0, or a wider one"
            raise ValueError(f"{self.name}: low={self.low} and high={self.high} {text}")

    def named(self, name: str) -> Hyperparameter:
        """A copy with a name. Raises ValueError where its start or its range is impossible."""
        return replace(self, name=name)

    def starting_inside(self, start: float, origin: str) -> Hyperparameter:
        """A copy that starts at a value.

        start: the value, which is moved inside the range: at least 1 % of its width from either end.
        origin: where the value comes from.
        """
        low, high = self.low, self.high
        if self.log and 0 < low < high < math.inf:
            factor = (high / low) ** 0.01
            low, high = low * factor, high / factor
        elif not self.integer and math.isfinite(high - low):
            margin = 0.01 * (high - low)
            low, high = low + margin, high - margin
        return replace(self, init=min(max(start, low), high), origin=origin)

    @property
    def interval(self) -> tuple[float, float]:
        """What the real line is mapped to, before an integer is floored: [low, high], or [low, high + 1) of an integer."""
        return self.low, self.high + self.integer

    @property
    def unconstrained(self) -> float:
        """The point of the real line that is mapped to init."""
        return self.unconstrained_at(self.init)

    def unconstrained_at(self, value: float) -> float:
        """The point of the real line that is mapped to a value inside the range."""
        low, high = self.interval
        if self.integer and math.isclose(value, whole := round(value), rel_tol=1e-9):  # means of schedules are inexact
            value = whole + 0.5
        if math.isinf(high):
            return math.log(value)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = min((value - low) / (high - low), 1 - 2.0**-53)  # which may round to 1
        return math.log(share) - math.log1p(-share)

    def inside(self, value: float) -> float:
        """A value of the interval, moved inside where it is at an end: by 1e-6 of its width, or 1e-12 without upper end.

        The width of a logarithmic range is that of logarithms. A range wider than 1 goes as near to its lower end as one of 1.
        """
        low, high = self.interval
        if math.isinf(high):
            return max(value, 1e-12)
        if self.log:
            factor = math.exp(1e-6 * (math.log(high) - math.log(low)))
            return min(max(value, low * factor), high / factor)
        width = high - low
        below, above = max(1e-6 * min(width, 1.0), 4 * math.ulp(low)), max(1e-6 * width, 4 * math.ulp(high))
        return min(max(value, low + below), high - above)

    def value_at(self, unconstrained: float) -> float:
        """The value at an unconstrained number, a point of the real line; that of an integer before it is rounded down."""
        low, high = self.interval
        if math.isinf(high):
            return math.exp(unconstrained)
        share = 1 / (1 + math.exp(-unconstrained)) if unconstrained > 0 else 1 - 1 / (1 + math.exp(unconstrained))
        if self.log:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return low + share * (high - low)

    def slope_at(self, unconstrained: float) -> float:
        """The derivative of `value_at` at an unconstrained number, > 0."""
        low, high = self.interval
        if math.isinf(high):
            return math.exp(unconstrained)
        slope = 1 / (2 + math.exp(unconstrained) + math.exp(-unconstrained))
        return slope * (self.value_at(unconstrained) * (math.log(high) - math.log(low)) if self.log else high - low)

    def __str__(self) -> str:
        return f"init={self.init:g}, low={self.low:g}, high={self.high:g}"


def check_places(name: str, where: Sequence[object], shared: object) -> None:
    """Raises TypeError where a spec's patterns are no texts, or `shared` is neither True nor False. name: of the spec."""
    if not all(isinstance(pattern, str) for pattern in where):
        raise TypeError(f"{name} takes module name patterns, got {where!r}")
    if not isinstance(shared, bool):
        raise TypeError(f"{name}: shared={shared!r} must be True, one λ for all, or False, one for each")
