"""Operations that draw random numbers at tuned strengths: what is tuned, what is drawn and what is done, in one class."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

from torch import Tensor, nn

from fxstn.hp.checks import Check
from fxstn.hp.specs import Choice, Spec
from fxstn.ir.input_errors import is_number
from fxstn.ir.staging import staged, staging_of

P = ParamSpec("P")
R = TypeVar("R")
Strength = Tensor | float
Settings = Mapping[str, object]


class WithProbability(Protocol):
    """A module that does something with probability p."""

    p: float


OPERATIONS: dict[Callable[..., Any], type[Operation]] = {}


class Operation(Spec):
    """Base of the specs that take over a random operation of the model, or insert one. In eval mode it is off.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.

    A subclass has `numbers`, {name: Hyperparameter}, the strengths in the order of draw's arguments, and two static functions:

    draw(x, *strengths, **settings) → drawn: all randomness, and nothing that is differentiated. A strength is a number, a
        0-d tensor, or (batch,) with one per example; `fxstn.ops.noise.by_example` makes it broadcast.
    apply(x, drawn, **settings) → y: shaped like x, of ordinary torch operations, or one operation that has a tangent rule. At
        strengths 0 it is x itself, bit for bit. Where a higher strength is not a stronger regularisation, its hyperparameter
        says regularizes=False.

    It may also have:

    defaults: settings, which are fixed numbers. `read` takes them from a module, the constructor from the user.
    checks: {setting: `fxstn.hp.checks` of it}, of what a user gives.
    images: whether it acts on images (batch, channels, H, W), or clips (batch, channels, T, H, W), and refuses other values.
    inserts: whether, without a pattern, it is inserted at "input" of a model that has no such module.
    examples: None where draw also takes `batch_axis`, and finds the examples there (`fxstn.ops.batch_axis`).
    follows: a function, such as F.embedding, whose results alone are matched, all of them without a pattern. draw gets the
        tuple of its arguments, in their canonical order, in place of x.
    """

    defaults: Mapping[str, object] = {}
    checks: Mapping[str, Check] = {}
    images: bool = False
    inserts: bool = True
    follows: ClassVar[Callable[..., Any] | None] = None
    draw: ClassVar[Callable[..., Any]]
    apply: ClassVar[Callable[..., Any]]
    function: ClassVar[Callable[..., Any]]  # the node of a canonical graph: (x, *strengths, **settings) → y

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | Mapping[str, str] | None = None,
                 **settings: object) -> None:  # fmt: skip
        for name, value in settings.items():
            if name not in self.defaults or (name in self.numbers and is_number(value)):  # meant as a start
                self.check_arguments({name: value}, self.defaults)
        settings = {name: _plain(value) for name, value in settings.items()}
        for name, (words, is_right) in self.checks.items():
            if name in settings and not is_right(settings[name]):
                raise ValueError(f"hp.{type(self).__name__}: {name}={settings[name]!r} must be {words}")
        self.settings = {**self.defaults, **settings}
        super().__init__(*where, init=init, low=low, high=high, scale=scale, shared=shared, perturb=perturb)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.numbers:  # a base class, without an operation of its own
            return
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        draw, apply = cls.draw, cls.apply
        of_torch = getattr(apply, "__module__", "") in ("_operator", "torch")  # these have a rule and take no settings

        def check_and_draw(x: Any, *strengths: Strength, **settings: object) -> object:
            if cls.images and x.dim() not in (4, 5):
                raise ValueError(f"hp.{cls.__name__} acts on images (batch, channels, H, W), or clips (batch, channels, T, H, "
                                 f"W), and got {tuple(x.shape)}; add the dimensions, or name where images are")  # fmt: skip
            return draw(x, *strengths, **settings)

        def run(x: object, *strengths: Strength, **settings: object) -> Tensor:
            return apply(x, check_and_draw(x, *strengths, **settings), **({} if of_torch else settings))

        # Functions of this class's own, so that graphs name them and two classes can share an implementation.
        cls.function = staticmethod(staged(overridable=True)(_named(run, kind)))
        cls.draw = staticmethod(staged(random=True)(_named(check_and_draw, f"draw_{kind}")))
        if not of_torch and staging_of(apply) is None:
            cls.apply = staticmethod(staged(_named(apply, f"apply_{kind}")))
        OPERATIONS[cls.function] = cls

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        """({number: the module's own strength}, settings). A subclass overrides it where attributes have other names."""
        starts = {name: float(getattr(module, name)) for name in cls.numbers if hasattr(module, name)}
        return starts, {name: getattr(module, name) for name in cls.defaults if hasattr(module, name)}

    @classmethod
    def call(cls, module: nn.Module, x: object) -> object:
        """What stands for module(x) while a forward is followed: x where the module does not train."""
        if not module.training:
            return x
        starts, settings = cls.read(module)
        strengths = [starts.get(name, 0.0) for name in cls.numbers]
        return cls.function(x, *strengths, **{**cls.defaults, **settings})


def _plain(value: object) -> object:
    """A setting as operations take it: a tuple in place of a list, the text of a member such as InterpolationMode.NEAREST."""
    if isinstance(value, Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value


def _named(function: Callable[P, R], name: str) -> Callable[P, R]:
    """The same function under another name."""

    @functools.wraps(function)
    def result(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    result.__name__ = result.__qualname__ = name
    result.__module__ = __name__  # with a user's module, `is_opaque` would be true
    return result
