"""Operations that draw random numbers at tuned strengths: what is tuned, what is drawn and what is done, in one class."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from fxstn.hp.specs import Choice, Spec
from fxstn.ir.staging import staged, staging_of

OPERATIONS: dict[Callable[..., Any], type[Operation]] = {}


class Operation(Spec):
    """Base of the specs that take over a random operation of the model, or insert one; off in eval mode.

    A subclass has `numbers`, {name: Hyperparameter}, the strengths in the order of draw's arguments, and two static functions:

    draw(x, *strengths, **settings) → drawn: all randomness, and nothing that is differentiated. A strength is a number, a
    0-d tensor, or (batch,) with one per example; `fxstn.ops.noise.by_example` makes it broadcast.
    apply(x, drawn, **settings) → y, shaped like x, of ordinary torch operations, or one that has a tangent rule; x itself,
    bit for bit, at strengths 0. Where more of one is not a stronger regularisation, its hyperparameter says regularizes=False.

    settings are fixed: `read` takes them from a module, the constructor from the user. inserts: whether "input" is the
    place without a pattern and without such a module in the model; otherwise only what is there is taken over. examples:
    None where draw also takes `place`, (axis, left, right), and finds the examples there (`fxstn.ops.examples`).
    follows: a function, F.embedding say, whose results alone are matched, all of them without a pattern; draw gets the tuple
    of its arguments, in their canonical order, in place of x.
    """

    defaults: Mapping[str, Any] = {}
    inserts: bool = True
    follows: ClassVar[Callable[..., Any] | None] = None
    draw: ClassVar[Callable[..., Any]]
    apply: ClassVar[Callable[..., Any]]
    function: ClassVar[Callable[..., Any]]  # the node of a canonical graph: (x, *strengths, **settings) → y

    def __init__(self, *where: str, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 shared: bool = False, perturb: str | Mapping[str, str] | None = None,
                 **settings: Any) -> None:  # fmt: skip
        if unknown := sorted(set(settings) - set(self.defaults)):
            known = ", ".join(self.defaults) or "none"
            raise TypeError(f"hp.{type(self).__name__} has no setting {unknown[0]!r}; it has {known}")
        self.settings = {**self.defaults, **settings}
        super().__init__(*where, init=init, low=low, high=high, scale=scale, shared=shared, perturb=perturb)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.numbers:  # a base of others
            return
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        drawing, applying = cls.draw, cls.apply
        of_torch = getattr(applying, "__module__", "") in ("_operator", "torch")  # has a rule, and takes no settings

        def run(x: Any, *strengths: Any, **settings: Any) -> Any:
            return applying(x, drawing(x, *strengths, **settings), **({} if of_torch else settings))

        # Functions of this class's own, so that graphs name them and two classes can share an implementation.
        cls.function = staticmethod(staged(_named(run, kind)))
        cls.draw = staticmethod(staged(random=True)(_named(drawing, f"draw_{kind}")))
        if not of_torch and staging_of(applying) is None:
            cls.apply = staticmethod(staged(_named(applying, f"apply_{kind}")))
        OPERATIONS[cls.function] = cls

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        """({number: the module's own strength}, settings): attributes of the same names, unless a subclass knows better."""
        starts = {name: float(getattr(module, name)) for name in cls.numbers if hasattr(module, name)}
        return starts, {name: getattr(module, name) for name in cls.defaults if hasattr(module, name)}

    @classmethod
    def call(cls, module: Any, x: Any) -> Any:
        """What stands for module(x) while a forward is followed: x where the module does not train."""
        if not module.training:
            return x
        starts, settings = cls.read(module)
        strengths = [starts.get(name, 0.0) for name in cls.numbers]
        return cls.function(x, *strengths, **{**cls.defaults, **settings})


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def result(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    result.__name__ = result.__qualname__ = name
    result.__module__ = __name__  # a user's function would be taken for one that fx was told not to follow
    return result
