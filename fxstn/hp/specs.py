"""What a user asks to tune. A spec says which modules (`where`), which numbers, their start, range and first σ."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable
from typing import Any

from fxstn.hp.bijection import Quantity


class Spec:
    """Base of all specs.

    where: fnmatch patterns over full module names, the root "" included (`*` crosses dots). init, low, high: start and
    range of the constrained value, low < init < high. scale: σ at the start, > 0, in unconstrained units. shared: one λ
    for all matches in place of one each.
    """

    kind = ""
    log = False

    def __init__(self, *where: str, init: float, low: float, high: float, scale: float, shared: bool) -> None:
        if not all(isinstance(pattern, str) for pattern in where):
            raise TypeError(f"hp.{type(self).__name__} takes module name patterns, got {where!r}")
        self.where, self.init, self.low, self.high = where, init, low, high
        self.scale, self.shared = scale, shared

    def __repr__(self) -> str:
        patterns = "".join(f"{pattern!r}, " for pattern in self.where)
        return f"hp.{type(self).__name__}({patterns}init={self.init:g}, low={self.low:g}, high={self.high:g})"

    def quantity(self, path: str, init: float | None = None) -> Quantity:
        """The tunable number at one match: 'path.kind'; 'kind' when shared or at the root; 'path' where it ends so."""
        named_so = path.rpartition(".")[2] == self.kind
        name = self.kind if self.shared or not path else path if named_so else f"{path}.{self.kind}"
        return Quantity(name, self.init if init is None else init, self.low, self.high, self.scale, self.log)

    def match(self, names: Iterable[str]) -> list[str]:
        """The names that a pattern matches, in the order given. Raises ValueError for a pattern that matches none."""
        names = list(names)
        for pattern in self.where:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise ValueError(
                    f"{self!r}: the pattern {pattern!r} matches nothing it could tune; nearest module names: "
                    + ", ".join(map(repr, close))
                )
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.where)]


class Dropout(Spec):
    """Dropout rate, in [0, 1). Takes over the dropout modules it matches; after any other module it inserts one.

    Only the outermost of the matches that are not dropouts get one inserted; "input" is the model's input. Without a
    pattern it acts where `hparams=None` would. Masks are per element, or per channel on a Dropout1d/2d/3d it takes over.
    """

    kind = "dropout"

    def __init__(self, *where: str, init: float = 0.05, low: float = 0.0, high: float = 0.95, scale: float = 1.0,
                 shared: bool = False) -> None:  # fmt: skip
        if not 0 <= low < high < 1:
            raise ValueError(f"hp.Dropout: need 0 <= low < high < 1, got low={low}, high={high}")
        super().__init__(*where, init=init, low=low, high=high, scale=scale, shared=shared)


class WeightDecay(Spec):
    """Coefficient λ of ½ λ ‖w‖², as in torch's optimisers, on a log scale.

    Applies to the weights (no biases, no norms) of the matched linear and convolution layers, all without a pattern.
    The penalty enters the training objectives in closed form on the structured response.
    """

    kind = "weight_decay"
    log = True

    def __init__(self, *where: str, init: float = 1e-4, low: float = 1e-7, high: float = 1e-1, scale: float = 1.0,
                 shared: bool = False) -> None:  # fmt: skip
        if not 0 < low < high < math.inf:
            raise ValueError(f"hp.WeightDecay: need 0 < low < high < inf, got low={low}, high={high}")
        super().__init__(*(where or ("*",)), init=init, low=low, high=high, scale=scale, shared=shared)


class Scalar(Spec):
    """Any number that the loss function reads, by `name`, from its argument `hparams` (one value per example).

    log: stretch the range in log space (low > 0). integer: floor the value. high=inf with low=0: any positive number.
    """

    def __init__(self, name: str, init: float, low: float, high: float, *, scale: float = 1.0, log: bool = False,
                 integer: bool = False) -> None:  # fmt: skip
        super().__init__(init=init, low=low, high=high, scale=scale, shared=True)
        self.kind, self.log, self.integer = name, log, integer

    def quantity(self, path: str, init: float | None = None) -> Quantity:
        return Quantity(self.kind, self.init, self.low, self.high, self.scale, self.log, self.integer)


def start_inside(p: float, spec: Any) -> float:
    """A module's own strength moved just inside the spec's range: by 1 % of its width at either end."""
    margin = 0.01 * (spec.high - spec.low)
    return min(max(p, spec.low + margin), spec.high - margin)
