"""Activation checkpointing is off while a forward is followed: its second forward, in the backward, would not be.

What was drawn or carried beside the first forward would then be missing from the second one. It costs the memory that
checkpointing saves.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch.utils.checkpoint as checkpointing


def runs_again(function: type) -> bool:
    """Whether a custom autograd function is one that runs a forward again in its backward: apply(run, preserve, *args)."""
    return issubclass(function, checkpointing.CheckpointFunction)


def without_checkpoints() -> Any:
    """Context manager: regions that would save nothing but their inputs save what they need, as anywhere else."""
    return mock.patch.object(checkpointing, "_checkpoint_hook", return_value=nullcontext())
