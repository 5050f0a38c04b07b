"""Activation checkpointing is off while a live run lasts: its second forward, in the backward, would not be followed.

What was drawn or carried beside the first forward would then be missing from the second one. This costs the memory that
checkpointing saves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch.utils.checkpoint as checkpointing


def runs_again(function: type) -> bool:
    """Whether a custom autograd function runs a forward again in its backward: apply(run, preserve, *args)."""
    return issubclass(function, checkpointing.CheckpointFunction)


def without_checkpoints() -> AbstractContextManager[object]:
    """Inside, a region that would save nothing but its inputs saves what it needs, as any other region does."""
    return mock.patch.object(checkpointing, "_checkpoint_hook", return_value=nullcontext())
