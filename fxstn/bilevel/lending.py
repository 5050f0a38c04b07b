"""A module that is something else for a while: other values in its tensors, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def lent(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The tensors, and every graph that shares them, have these values while this lasts."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        _fill(tensors, values)
        yield
    finally:
        _fill(tensors, kept)


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients, then as it was."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
