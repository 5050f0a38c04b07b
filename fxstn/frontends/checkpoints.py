"""Activation checkpointing (torch.utils.checkpoint), whose second forward, in the backward pass, nobody's mode is active in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import torch.utils.checkpoint as checkpointing

Run = Callable[..., object]


def runs_again(function: type) -> bool:
    """Whether a custom autograd function runs a forward again in its backward: apply(run, preserve, *args)."""
    return issubclass(function, checkpointing.CheckpointFunction)


def without_checkpoints() -> AbstractContextManager[object]:
    """Inside, a region that would save nothing but its inputs saves what it needs, as any other region does.

    A run that is followed lasts as long as its first forward: what was drawn or carried beside it would be missing from the
    second one. This costs the memory that checkpointing saves.
    """
    return mock.patch.object(checkpointing, "_checkpoint_hook", return_value=nullcontext())


@contextmanager
def reruns(resume: Callable[[Run], Run]) -> Iterator[None]:
    """Inside, the second forward of a region is resume(its forward), which is made where the first one begins."""
    hook, forward = checkpointing._checkpoint_hook, checkpointing.CheckpointFunction.forward

    def resumed_hook(frame: checkpointing._CheckpointFrame) -> object:
        frame.recompute_fn = resume(frame.recompute_fn)
        return hook(frame)

    def resumed_forward(context: object, run: Run, preserve: bool, *args: object) -> object:
        return forward(context, resume(run), preserve, *args)

    _set(resumed_hook, resumed_forward)  # unittest.mock would take longer than a layer
    try:
        yield
    finally:
        _set(hook, forward)


def _set(hook: Run, forward: Run) -> None:
    vars(checkpointing)["_checkpoint_hook"] = hook
    type.__setattr__(checkpointing.CheckpointFunction, "forward", staticmethod(forward))
