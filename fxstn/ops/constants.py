"""Constants on a device: a copy from the host would let it wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers, (n,), in the type and on the device of another tensor; a kernel fills in each."""
    if len(set(values)) == 1:
        return like.new_full((len(values),), values[0])
    return torch.cat([like.new_full((1,), value) for value in values])


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers that images (batch, channels, ...) take, one for all channels or one for each: (1, 1 or channels, 1, 1).

    Raises ValueError for another number of them.
    """
    if len(values) not in (1, like.shape[1]):
        raise ValueError(f"{len(values)} values, {tuple(values)}, do not fill images of {like.shape[1]} channels; give one, or "
                         "one for each channel")  # fmt: skip
    return constant(values, like).view(1, -1, 1, 1)
