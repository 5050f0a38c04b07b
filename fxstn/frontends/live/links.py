"""How outputs that end in softmax, in sigmoid or in a loss are linearised: before these, not after (paper, Eq. 3.13)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.ir.tangents import ZERO
from fxstn.ir.vocabulary import LINKS, VIEWS
from fxstn.rules.layers import dense
from fxstn.rules.loss import is_loss


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a run that is no layer, to be carried out again at linearised arguments.

    args, kwargs: primal values.
    tangents, named: of these.
    before: {id of a value among them: the step that it is the result of}.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: Mapping[str, object]
    tangents: tuple
    named: Mapping[str, object]
    before: Mapping[int, Step] = field(default_factory=dict)

    @property
    def is_loss(self) -> bool:
        """Whether the result is a loss, or is computed from losses alone."""
        pairs = [
            *zip(self.args, self.tangents, strict=True),
            *((self.kwargs[name], t) for name, t in self.named.items()),
        ]
        varying = [self.before.get(id(value)) for value, tangent in pairs if tangent is not ZERO]
        return is_loss(self.function) or (bool(varying) and all(step is not None and step.is_loss for step in varying))

    @property
    def is_link(self) -> bool:
        """Whether the result is link(z), or a view of it."""
        if self.function in VIEWS and isinstance(self.args[0], Tensor):
            return id(self.args[0]) in self.before and self.before[id(self.args[0])].is_link
        return self.function in LINKS

    def linearized(self, outputs: Collection[Step] = (), loss: bool = False) -> Any:
        """link(z + dz) of a link or a view of it.

        loss: the result is a loss, or lies between a loss and the layers. Then it is computed from their linearised outputs.
        outputs: steps whose results the model returns beside the loss; these results are linearised as they are returned.
        """
        deep = loss and not is_loss(self.function)

        def argument(value: object, tangent: object) -> object:
            if isinstance(value, (tuple, list)) and isinstance(tangent, (tuple, list)):
                return type(value)(map(argument, value, tangent))
            step = self.before.get(id(value))
            if tangent is ZERO or not isinstance(value, Tensor):
                return value
            if step is not None and (step.is_link or (deep and step not in outputs)):
                return step.linearized(outputs, deep and step not in outputs)
            return value + cast(Tensor, dense(tangent))

        kwargs = {name: argument(value, self.named[name]) for name, value in self.kwargs.items()}
        return self.function(*map(argument, self.args, self.tangents), **kwargs)


class Links:
    """The step that each tensor of a run is the result of. A step knows those before it, back to the layers."""

    def __init__(self) -> None:
        self.steps = WeakTensorKeyDictionary()

    def record(self, result: Tensor, step: Step | None) -> None:
        """Enter the result of an operation; None for a layer."""
        if step is not None:
            self.steps[result] = step

    def find(self, x: Tensor) -> Step | None:
        return self.steps.get(x)

    def forget(self, x: Tensor) -> None:
        """x was written into."""
        self.steps.pop(x, None)
