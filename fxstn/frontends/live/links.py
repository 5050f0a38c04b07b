"""Final softmax and sigmoid: the output is linearised before them, not after (paper, Eq. 3.13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.ir.spelling import Spelled
from fxstn.ir.vocabulary import LINKS, VIEWS


@dataclass(frozen=True)
class Link:
    """A value link(z) with the tangent dz of z: its linearised form is link(z + dz)."""

    link: Callable[[Tensor], Tensor]
    z: Tensor
    dz: Tensor

    def linearized(self) -> Tensor:
        return self.link(self.z + self.dz)


class Links:
    """Which tensors of a run are results of softmax or its like, possibly seen through views."""

    def __init__(self) -> None:
        self.links = WeakTensorKeyDictionary()

    def record(self, result: Tensor, spelled: Spelled, args: list, tangents: list) -> None:
        """Enter the result of an operation, if it is one of these.

        args, tangents: what its rule got.
        """
        function, rest, kwargs = spelled.function, args[1:], spelled.kwargs
        if function in LINKS:
            self.links[result] = Link(lambda z: function(z, *rest, **kwargs), args[0], tangents[0])
        elif function in VIEWS and (inner := self.find(spelled.args[0])):
            self.links[result] = replace(inner, link=lambda z: function(inner.link(z), *rest, **kwargs))

    def find(self, x: Tensor) -> Link | None:
        return self.links.get(x)

    def forget(self, x: Tensor) -> None:
        """x was written into."""
        self.links.pop(x, None)
