"""Targets of training batches that move along with the images of a network that moves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fxstn.bilevel.faults import warn_caller
from fxstn.hp.moving import moves_so_far, recorded_moves
from fxstn.hp.targets import STILL, move_target, still_maps

F = TypeVar("F")
_OF_BATCH = "reads_batch"


def of_batch(loss_fn: F) -> F:
    """Mark a loss function that takes the whole batch as its target, and finds the target in it."""
    setattr(loss_fn, _OF_BATCH, True)
    return loss_fn


@contextmanager
def moving_along(target: object, loss_fn: object) -> Iterator[None]:
    """Around a training objective, whose `moved_target` then knows how its images were moved.

    Warns of maps in the target that stay, because nothing says whether they belong to places of the image.
    """
    with recorded_moves() as moves:
        yield
    if moves and not hasattr(loss_fn, _OF_BATCH) and still_maps(target, moves):
        warn_caller(
            f"hp.{moves[0].operation.__name__} moves the images and not the target, a map of floating point numbers in their "
            "size: give it as torchvision.tv_tensors.Image or Mask where it should move along (unpack= of the runner)",
            UserWarning,
        )


def moved_target(target: Any, loss_fn: object) -> Any:
    """A target moved as the images of the objective under way; that of `of_batch` as it is."""
    moves = moves_so_far()
    return target if not moves or hasattr(loss_fn, _OF_BATCH) else move_target(target, moves)[0]


def refuse_moves(target: object) -> None:
    """Raises ValueError for a target in somebody else's loop that would have to move, and does not in that loop's own steps."""
    moves = moves_so_far()
    if moves and (kinds := move_target(target, moves)[1] - {STILL}):
        raise ValueError(
            f"hp.{moves[0].operation.__name__} moves the images, and the target has {min(kinds)}, which a loop of your own "
            "does not move along: use fxstn.transform with BilevelRunner, or move both in the data set, outside of the model"
        )
