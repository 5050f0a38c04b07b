"""Operations that move the pixels of images, and what moves along in the target: masks, boxes and keypoints."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxstn.hp.operation import Operation, Settings

_RECORDERS: list[list[Move]] = []
_KEY = "records_moves"


class Moving(Operation):
    """Base of operations that move the pixels of images (batch, channels, ..., H, W); they move the target along.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.

    A subclass has, besides draw and apply, two static functions of what was drawn:

    move_map(maps, drawn, **settings) → maps (batch, channels, H, W) of whole numbers, moved as the images are, each pixel from
        one place.
    move_points(points, drawn, size, **settings) → where points (batch, n, 2) of an image of size (H, W) go. x is first, in
        pixels from the top left corner, so that the last pixel ends at (W, H).

    Both act where a target holds masks, boxes or keypoints (`fxstn.hp.targets`).
    """

    move_map: ClassVar[Any]
    move_points: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        if cls.numbers and not hasattr(cls.draw, _KEY):
            cls.draw = staticmethod(_recording(cls, cls.draw))
        super().__init_subclass__()

    @staticmethod
    def at_scale(drawn: Any, ratio: tuple[float, float]) -> Any:
        """What was drawn, for an image of another size: ratio times the (height, width) that it was drawn for."""
        return drawn


@dataclass(frozen=True)
class Move:
    """One draw of an operation that moves pixels, for a batch.

    operation: whose draw it is.
    drawn: of draw, tensors with a row per example.
    size: (H, W) of what it moved.
    """

    operation: type[Moving]
    drawn: Any
    size: tuple[int, int]
    settings: Settings

    def of_example(self, index: int) -> Move:
        """That of one example, as of a batch of one."""
        return replace(self, drawn=tree_map_only(Tensor, lambda x: x[index : index + 1], self.drawn))

    def maps(self, maps: Tensor) -> Tensor:
        """Maps (batch, channels, H, W) of any size, moved along."""
        return self.operation.move_map(maps, self._at(maps.shape[-2:]), **self.settings)

    def images(self, images: Tensor) -> Tensor:
        """Images (batch, channels, H, W) of any size, moved along."""
        return self.operation.apply(images, self._at(images.shape[-2:]), **self.settings)

    def points(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Points (batch, n, 2) of an image of any size (H, W), moved along."""
        return self.operation.move_points(points, self._at(size), size, **self.settings)

    def _at(self, size: tuple[int, ...]) -> Any:
        height, width = self.size
        ratio = (size[0] / height, size[1] / width)
        return self.drawn if ratio == (1, 1) else self.operation.at_scale(self.drawn, ratio)


def _recording(operation: type[Moving], draw: Any) -> Any:
    """The same draw, of which whoever records moves is told."""

    @functools.wraps(draw)
    def recorded(x: Tensor, *strengths: object, **settings: object) -> Any:
        drawn = draw(x, *strengths, **settings)
        if _RECORDERS:
            _RECORDERS[-1].append(Move(operation, drawn, (x.shape[-2], x.shape[-1]), settings))
        return drawn

    setattr(recorded, _KEY, True)
    return recorded


@contextmanager
def recorded_moves() -> Iterator[list[Move]]:
    """Inside, the moves of images are noted, in the order they are drawn; of nested contexts the innermost notes them."""
    moves: list[Move] = []
    _RECORDERS.append(moves)
    try:
        yield moves
    finally:
        _RECORDERS.pop()


def moves_so_far() -> list[Move]:
    """Those noted by the innermost `recorded_moves`; none outside of any."""
    return _RECORDERS[-1] if _RECORDERS else []
