"""Specs: what a user asks to tune. A spec says which modules (`where`), which numbers, their start, range and first σ."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Never, TypedDict

from fxstn.hp.hyperparameter import CHOSEN, OWN, USUAL, Hyperparameter, check_places
from fxstn.ir.input_errors import is_number

Choice = float | Mapping[str, float] | None
_STARTS = (
    "p", "prob", "probability", "rate", "strength", "value", "lam", "coefficient", "weight", "smoothing",
)  # called init here  # fmt: skip
_NOT_KEYWORDS = ("where", "unknown", "choices", "settings")


class Choices(TypedDict, total=False):
    """The keywords of every spec."""

    init: Choice
    low: Choice
    high: Choice
    scale: Choice
    shared: bool
    perturb: str | Mapping[str, str] | None


class Spec:
    """Base of all specs.

    where: fnmatch patterns over full module names, the root "" included. `*` also matches dots. A module that is registered
        several times matches by any of its names, and is called by the first.
    init: the start of λ. A number is for all numbers of the spec, {"hue": 0.1} for one of them. None: the strength of the
        module that the spec takes over. Where this is off, at 0, or there is none: the spec's own start, that of the usual
        recipe (docs/guides/augmentations.md has them), moved inside the range.
    low, high: ends of the range, likewise. None keeps the spec's own.
    scale: σ at the start, likewise.
    shared: True gives one λ to all matches. False gives each match its own.
    perturb: "example" draws a perturbation per example where the step does so, "batch" draws one that the examples of a batch
        share. By name too, {"hue": "batch"}.

    A subclass has `numbers`, {name: Hyperparameter}, and `examples`, the dimension of a value along which it expects the
    examples where strengths differ between them; with None it learns the dimension from its argument `place`.

    Raises ValueError for a name that is none of its numbers, for an impossible range, and for another `perturb`. Raises
    TypeError for a pattern that is no text.
    """

    numbers: Mapping[str, Hyperparameter] = {}
    examples: int | None = 0

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | Mapping[str, str] | None = None, **unknown: Never) -> None:  # fmt: skip
        self.check_arguments(unknown)
        check_places(f"hp.{type(self).__name__}", where, shared)
        self.where, self.shared = where, shared
        choices: dict[str, Choice] = {"init": init, "low": low, "high": high, "scale": scale}
        for key, choice in choices.items():
            self._check_numbers(key, choice)
            self._check_names(key, choice)
        chosen = init if isinstance(init, Mapping) else dict.fromkeys(self.numbers, init)
        self.numbers = {
            name: replace(
                number,
                init=_choice(init, name, number.init),
                origin=number.origin if chosen.get(name) is None else CHOSEN,
                low=_choice(low, name, number.low),
                high=_choice(high, name, number.high),
                scale=_choice(scale, name, number.scale),
                by_batch=self._by_batch(name, number, perturb),
            )
            for name, number in self.numbers.items()
        }
        self._check_names("perturb", perturb)
        self.check()

    @classmethod
    def check_arguments(cls, unknown: Mapping[str, object], settings: Iterable[str] = ()) -> None:
        """Raises TypeError for unknown keywords, which a spec does not take. settings: further ones that it takes."""
        for name, value in unknown.items():
            if name in cls.numbers and len(cls.numbers) > 1:
                remedy = f"the start is init={{{name!r}: {value!r}}}"
            elif name in cls.numbers or name in _STARTS:
                remedy = f"the start is init={value!r}"
            else:
                parameters = inspect.signature(cls).parameters
                inherited = Choices.__annotations__ if "choices" in parameters else ()
                own = [key for key in parameters if key not in _NOT_KEYWORDS]
                remedy = f"it has {', '.join([*settings, *own, *inherited])}"
            raise TypeError(f"hp.{cls.__name__} has no argument {name!r}; {remedy}")

    @classmethod
    def _check_numbers(cls, key: str, choice: object) -> None:
        """Raises TypeError for what is neither a number nor a mapping to numbers, nor None."""
        for value in choice.values() if isinstance(choice, Mapping) else [choice]:
            if value is not None and not is_number(value):
                raise TypeError(
                    f"hp.{cls.__name__}: {key}={value!r} must be a number, or numbers by name; write {key}=0.1, say"
                )

    def _check_names(self, key: str, choice: object) -> None:
        """Raises ValueError for a choice by name where a name is none of the spec's numbers."""
        if isinstance(choice, Mapping) and (unknown := [name for name in choice if name not in self.numbers]):
            known = ", ".join(map(repr, self.numbers))
            raise ValueError(f"hp.{type(self).__name__}: {key} is given for {unknown[0]!r}; its numbers are {known}")

    def _by_batch(self, name: str, number: Hyperparameter, perturb: str | Mapping[str, str] | None) -> bool:
        """Whether all examples share the perturbation of a number."""
        choice = perturb.get(name) if isinstance(perturb, Mapping) else perturb
        if choice is None:
            return number.by_batch
        if not isinstance(choice, str) or choice not in ("example", "batch"):
            raise ValueError(f"hp.{type(self).__name__}: perturb={choice!r} is neither 'example' nor 'batch'")
        if number.by_batch and choice == "example":
            raise ValueError(
                f"hp.{type(self).__name__}: {name} has one value for all examples of a batch; write perturb='batch'"
            )
        return choice == "batch"

    def check(self) -> None:
        """Raises ValueError for a range that is not inside the one that the operation allows."""
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

    def hyperparameters(
        self, path: str, starts: Mapping[str, float] | None = None, others: Collection[str] = ()
    ) -> list[Hyperparameter]:
        """The hyperparameters at one match.

        They are called 'path.name', but 'name' at the root, and 'path' where it ends in the name.
        path: of the match; of a shared spec "", or its patterns where another one shares a number of this name.
        starts: a module's own strengths by name. They stand where the user gives no init, unless all are 0, so that it is off.
        others: names that are in use, by a dropout after the module 'a' for one at 'a.dropout'.
        """
        result = []
        for kind, number in self.numbers.items():
            ends = path.rpartition(".")[2] == kind and path not in others
            name = kind if not path else path if ends else f"{path}.{kind}"
            if number.origin != CHOSEN:
                start, origin = (starts[kind], OWN) if starts and any(starts.values()) else (number.init, number.origin)
                number = number.starting_inside(start, origin)
            result.append(number.named(name))
        return result

    def match(self, names: Iterable[str], what: str = "") -> list[str]:
        """The names that a pattern matches, in their own order.

        what: what the names are, for the message. Raises ValueError for a pattern that matches none.
        """
        names = list(names)
        for pattern in self.where:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                shown = ", ".join(repr(name) if name else "'' (the whole model)" for name in close)
                others = "no others" if what else "none of these"
                nearest = f"nearest module names: {shown}" if close else f"the model has {others}"
                raise ValueError(
                    f"hp.{type(self).__name__}: the pattern {pattern!r} matches nothing it could tune{what}; {nearest}. "
                    "A pattern is a whole name, or has wildcards of fnmatch: 'a*' matches 'a' and 'a.b.c'"
                )
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.where)]


class Dropout(Spec):
    """Dropout rate, in [0, 1) (Srivastava et al. 2014). It takes over dropouts that it matches, and follows other modules.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`. The pattern "input" is the model's input.

    If a pattern matches nested modules, only the outer one gets a dropout. Without a pattern the spec tunes every dropout of
    the model; if there is none, it inserts dropout at the input (of floats) and after each top-level stage but the last.
    Masks are per element, or per channel where it takes over a Dropout1d, 2d or 3d.
    """

    numbers: Mapping[str, Hyperparameter] = {"dropout": Hyperparameter(0.1, 0.0, 0.95)}
    examples = None

    def check(self) -> None:
        (number,) = self.numbers.values()
        if not 0 <= number.low < number.high < 1:
            raise ValueError(f"hp.Dropout: need 0 <= low < high < 1, got low={number.low}, high={number.high}")


class Coefficient(Spec):
    """Base of the specs of a penalty's coefficient, on a log scale: any positive range, or low=0 with high=inf."""

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
    """Coefficient λ of ½ λ ‖w‖², as in torch's optimisers, on a log scale.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`. A pattern may also match one weight by its full name, if it
        does not match the layer of that weight.
    norm: 2, or 1 for λ ‖w‖₁.

    It acts on the weights (no biases, no norms) of the matched linear and convolution layers. Without a pattern: all.
    Embeddings need a pattern that is their whole name. The training loss gets the penalty in closed form, without weights per
    example. Where torch parametrizes a weight, by weight_norm say, the parameters that it is computed from decay.
    """

    exempt: Collection[str] = ()  # names of parameters that have no decay, whatever the patterns say
    undecayed: Collection[str] = ()  # those that have none unless the patterns match no others

    numbers: Mapping[str, Hyperparameter] = {"weight_decay": Hyperparameter(5e-4, 1e-7, 1e-1, log=True)}

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | None = None, norm: int = 2, **unknown: Never) -> None:  # fmt: skip
        self.check_arguments(unknown)
        if norm not in (1, 2):
            raise ValueError(f"hp.WeightDecay: norm={norm!r} is neither 1 nor 2")
        self.norm = norm
        if norm == 1:
            self.numbers = {"l1_decay": self.numbers["weight_decay"]}
        super().__init__(*(where or ("*",)), init=init, low=low, high=high, scale=scale, shared=shared, perturb=perturb)


class Scalar(Spec):
    """Any number that the loss function reads, by `name`, from its argument `hparams` (one value per example).

    name: the name of the hyperparameter, too.
    init: the start, a number inside the range.
    scale: > 0, σ at the start.
    low, high: ends of the range. high=inf with low=0 means any positive number.
    log: whether equal steps multiply the value; it needs low > 0.
    integer: whether values are whole numbers, low and high included.
    perturb: see `hp.Spec`.
    regularizes: whether a higher value is a stronger regularisation. The generalisation gap then limits its steps
        (`fxstn.optim.set_gap`).
    """

    def __init__(self, name: str, init: float, low: float, high: float, *, scale: float = 1.0, log: bool = False,
                 integer: bool = False, perturb: str | None = None, regularizes: bool = False,
                 **unknown: Never) -> None:  # fmt: skip
        self.check_arguments(unknown)
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"hp.{type(self).__name__}: the name {name!r} must be text, by which the loss function asks for it"
            )
        for key, value in {"init": init, "low": low, "high": high, "scale": scale}.items():
            if value is None or isinstance(value, Mapping):
                raise TypeError(f"hp.{type(self).__name__}: {key}={value!r} must be a number; write {key}=0.1, say")
            self._check_numbers(key, value)
        self.numbers = {
            name: Hyperparameter(init, low, high, scale, log, integer, regularizes=regularizes, origin=CHOSEN)
        }
        super().__init__(shared=True, perturb=perturb)


class LabelSmoothing(Scalar):
    """Label smoothing, in [0, 1). `fxstn.cross_entropy` reads it, per example (Szegedy et al. 2016, Sec. 7).

    init, low, high, scale, perturb: see `hp.Spec`. The usual recipe has 0.1.
    """

    def __init__(self, init: float | None = None, low: float = 0.0, high: float = 0.5, *, scale: float = 1.0,
                 perturb: str | None = None, **unknown: Never) -> None:  # fmt: skip
        self.check_arguments(unknown)
        start = 0.1 if init is None else init
        super().__init__("label_smoothing", start, low, high, scale=scale, perturb=perturb, regularizes=True)
        if init is None:
            self.numbers = {name: replace(number, origin=USUAL) for name, number in self.numbers.items()}

    def check(self) -> None:
        (number,) = self.numbers.values()
        if not 0 <= number.low < number.high < 1:
            raise ValueError(f"hp.LabelSmoothing: need 0 <= low < high < 1, got low={number.low}, high={number.high}")


def _choice(choice: Choice, name: str, own: float) -> float:
    """What is chosen for a number; its own value where nothing is."""
    choice = choice.get(name) if isinstance(choice, Mapping) else choice
    return own if choice is None else choice
