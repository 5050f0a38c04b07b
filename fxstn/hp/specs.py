"""What a user asks to tune. A spec says which modules (`where`), which numbers, their start, range and first σ."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fxstn.hp.hyperparameter import Hyperparameter

Choice = float | Mapping[str, float] | None


class Spec:
    """Base of all specs.

    where: fnmatch patterns over full module names, the root "" included (`*` crosses dots). init, low, high, scale: in place
    of the numbers' own, for all of them or by name, {"hue": 0.1}. shared: one λ for all matches in place of one each. perturb:
    "example" for a perturbation per example where a step draws those, "batch" for one that its examples share; by name too.

    A subclass has `numbers` and `examples`, the dimension of a value along which it expects the examples where strengths
    differ between them; None: any, as it is told.

    Raises ValueError for a name that is none of its numbers, where a number's range is impossible, for another `perturb`.
    """

    numbers: Mapping[str, Hyperparameter] = {}
    examples: int | None = 0

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | Mapping[str, str] | None = None) -> None:  # fmt: skip
        if not all(isinstance(pattern, str) for pattern in where):
            raise TypeError(f"hp.{type(self).__name__} takes module name patterns, got {where!r}")
        self.where, self.shared = where, shared
        for key, choice in {"init": init, "low": low, "high": high, "scale": scale}.items():
            self._need_numbers(**{key: choice})
            if choice is not None:
                self.numbers = self._changed(key, choice)
        if perturb is not None:
            self._perturb(perturb)
        self.check()

    @classmethod
    def _need_numbers(cls, **given: Any) -> None:
        """Raises TypeError for what is neither a number nor a mapping to some, nor None."""
        for key, choice in given.items():
            for value in choice.values() if isinstance(choice, Mapping) else [choice]:
                if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                    raise TypeError(
                        f"hp.{cls.__name__}: {key}={value!r} must be a number, or numbers by name; write {key}=0.1, say"
                    )

    def _perturb(self, choice: str | Mapping[str, str]) -> None:
        by_name = choice if isinstance(choice, Mapping) else dict.fromkeys(self.numbers, choice)
        if wrong := [value for value in by_name.values() if value not in ("example", "batch")]:
            raise ValueError(f"hp.{type(self).__name__}: perturb={wrong[0]!r} is neither 'example' nor 'batch'")
        shared = {name: value == "batch" for name, value in by_name.items()}
        if alike := [
            name for name in shared if name in self.numbers and self.numbers[name].by_batch and not shared[name]
        ]:
            raise ValueError(
                f"hp.{type(self).__name__}: {alike[0]} has one value for all examples of a batch, perturb='batch'"
            )
        self.numbers = self._changed("by_batch", shared)

    def _changed(self, key: str, choice: float | Mapping[str, float]) -> dict[str, Hyperparameter]:
        by_name = choice if isinstance(choice, Mapping) else dict.fromkeys(self.numbers, choice)
        if unknown := [name for name in by_name if name not in self.numbers]:
            known = ", ".join(map(repr, self.numbers))
            raise ValueError(f"hp.{type(self).__name__}: {key} is given for {unknown[0]!r}; its numbers are {known}")
        return {
            name: replace(number, **{key: by_name[name]}) if name in by_name else number  # type: ignore[arg-type]
            for name, number in self.numbers.items()
        }

    def check(self) -> None:
        """Raise ValueError where a range is impossible for the operation: what its own limits leave."""
        own = type(self).numbers
        for name, number in self.numbers.items():
            if name in own and not own[name].low <= number.low < number.high <= own[name].high:
                raise ValueError(
                    f"hp.{type(self).__name__}: need {own[name].low:g} <= low < high <= {own[name].high:g} for {name}, got "
                    f"low={number.low:g}, high={number.high:g}"
                )

    def __repr__(self) -> str:
        patterns = "".join(f"{pattern!r}, " for pattern in self.where)
        several = len(self.numbers) > 1
        numbers = ", ".join(f"{name}: {number}" if several else str(number) for name, number in self.numbers.items())
        return f"hp.{type(self).__name__}({patterns}{numbers})"

    def hyperparameters(self, path: str, starts: Mapping[str, float] | None = None) -> list[Hyperparameter]:
        """The hyperparameters at one match.

        They are called 'path.name', but 'name' when shared or at the root, and 'path' where it ends in the name.
        starts: a module's own strengths by name, in place of init. They are moved inside the range.
        """
        result = []
        for kind, number in self.numbers.items():
            name = kind if self.shared or not path else path if path.rpartition(".")[2] == kind else f"{path}.{kind}"
            if starts and kind in starts:
                number = number.starting_inside(starts[kind])
            result.append(number.named(name))
        return result

    def match(self, names: Iterable[str], what: str = "") -> list[str]:
        """The names that a pattern matches, in the order given. Raises ValueError for a pattern that matches none; what:
        they are, for the message."""
        names = list(names)
        for pattern in self.where:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise ValueError(
                    f"{self!r}: the pattern {pattern!r} matches nothing it could tune{what}; nearest module names: "
                    + ", ".join(map(repr, close))
                )
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.where)]


class Dropout(Spec):
    """Dropout rate, in [0, 1). Takes over the dropout modules it matches; after any other module it inserts one.

    Only the outermost of the matches that are not dropouts get one inserted; "input" is the model's input. Without a
    pattern it acts where `hparams=None` would. Masks are per element, or per channel on a Dropout1d/2d/3d it takes over.
    """

    numbers: Mapping[str, Hyperparameter] = {"dropout": Hyperparameter(0.05, 0.0, 0.95)}
    examples = None

    def check(self) -> None:
        (number,) = self.numbers.values()
        if not 0 <= number.low < number.high < 1:
            raise ValueError(f"hp.Dropout: need 0 <= low < high < 1, got low={number.low}, high={number.high}")


class Coefficient(Spec):
    """Base of the specs of a penalty's coefficient: any positive range, on a log scale; low=0 with high=inf: any at all."""

    def check(self) -> None:
        ((name, number),) = self.numbers.items()
        if (number.low, number.high) == (0, math.inf):
            self.numbers = {name: replace(number, log=False)}  # exp, without a range to stretch
        elif not 0 < number.low < number.high < math.inf:
            raise ValueError(
                f"hp.{type(self).__name__}: need 0 < low < high < inf for {name}, or low=0 with high=inf, got "
                f"low={number.low}, high={number.high}"
            )


class WeightDecay(Coefficient):
    """Coefficient λ of ½ λ ‖w‖², as in torch's optimisers, on a log scale; of λ ‖w‖₁ with norm=1.

    Applies to the weights (no biases, no norms) of the matched linear and convolution layers, all without a pattern. A
    pattern may also match a weight by its full name, where the layer that owns it is not matched.
    The penalty enters the training objectives in closed form on the structured response.
    """

    numbers: Mapping[str, Hyperparameter] = {"weight_decay": Hyperparameter(1e-4, 1e-7, 1e-1, log=True)}

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | None = None, norm: int = 2) -> None:  # fmt: skip
        if norm not in (1, 2):
            raise ValueError(f"hp.WeightDecay: norm={norm!r} is neither 1 nor 2")
        self.norm = norm
        if norm == 1:
            self.numbers = {"l1_decay": self.numbers["weight_decay"]}
        super().__init__(*(where or ("*",)), init=init, low=low, high=high, scale=scale, shared=shared, perturb=perturb)


class Scalar(Spec):
    """Any number that the loss function reads, by `name`, from its argument `hparams` (one value per example).

    low, high: ends of the range. high=inf with low=0 means any positive number.
    log: the range is stretched in log space (low > 0).
    integer: the value is floored. It reaches both ends.
    regularizes: a higher value is a stronger regularisation. Its steps are limited by how far the network overfits
        (`fxstn.optim.set_gap`).
    """

    def __init__(self, name: str, init: float, low: float, high: float, *, scale: float = 1.0, log: bool = False,
                 integer: bool = False, perturb: str | None = None, regularizes: bool = False) -> None:  # fmt: skip
        if not isinstance(name, str):
            raise TypeError(
                f"hp.{type(self).__name__}: the name {name!r} must be text, by which the loss function asks for it"
            )
        self._need_numbers(init=init, low=low, high=high, scale=scale)
        self.numbers = {name: Hyperparameter(init, low, high, scale, log, integer, regularizes=regularizes)}
        super().__init__(shared=True, perturb=perturb)


class LabelSmoothing(Scalar):
    """Label smoothing, in [0, 1): `fxstn.cross_entropy` reads it, per example (Szegedy et al. 2016, Sec. 7)."""

    def __init__(self, init: float = 0.05, low: float = 0.0, high: float = 0.5, *, scale: float = 1.0,
                 perturb: str | None = None) -> None:  # fmt: skip
        if not 0 <= low < high < 1:
            raise ValueError(f"hp.LabelSmoothing: need 0 <= low < high < 1, got low={low}, high={high}")
        super().__init__("label_smoothing", init, low, high, scale=scale, perturb=perturb, regularizes=True)
