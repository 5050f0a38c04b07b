"""Recurrent layers on fake tensors: torch runs through time to learn the shapes of their results, which fixes the length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_LAYERS = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]


@contextmanager
def recurrent_shapes() -> Iterator[None]:
    """Inside, recurrent layers that are exported compute nothing but the shapes of their results."""
    with ExitStack() as stack:
        for layer in _LAYERS:
            stack.callback(layer._dispatch_cache.clear)
            stack.enter_context(mock.patch.dict(layer.py_kernels, dict.fromkeys(layer.py_kernels, _shapes)))
            layer._dispatch_cache.clear()
        yield


def _shapes(x: Tensor, hx: Tensor | Sequence[Tensor], params: object, has_biases: bool, num_layers: int, dropout: float,
            train: bool, bidirectional: bool, batch_first: bool) -> tuple[Any, ...]:  # fmt: skip
    """The arguments are those of torch.lstm and its kin."""
    states = (hx,) if isinstance(hx, Tensor) else hx
    width = (1 + bidirectional) * states[0].shape[-1]
    return x.new_empty((*x.shape[:-1], width)), *(state.new_empty(state.shape) for state in states)
