"""Random numbers that a user's forward draws for a batch, such as noise that its inputs and its target share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fxstn.bilevel.batches import Whole
from fxstn.ir.generators import forked_rng, reseed


@dataclass(frozen=True)
class Draws(Whole):
    """What a forward draws for a batch, which has it with it."""

    seed: int

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the forward draws what it has drawn; the loop's own generators are as they were afterwards."""
        with forked_rng():
            reseed(self.seed)
            yield


def with_draws(forward: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The forward for what a reader has made of a batch."""

    def replayed(model: object, batch: object) -> tuple[Any, Any]:
        if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Draws):
            with batch[1].again():
                return forward(model, batch[0])
        return forward(model, batch)

    return replayed
