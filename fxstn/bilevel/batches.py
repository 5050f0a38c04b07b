"""What happens to a batch before a step: unpacked, moved to the device, laid out, cut to a part of its examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxstn.bilevel.faults import check_batch
from fxstn.ops.batch_axis import batch_size

_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def placed(
    batch: Any, device: torch.device, memory_format: torch.memory_format | None, name: str = "a loader"
) -> tuple[Any, Any]:
    """(inputs, target) on the device, images in the memory format. Raises ValueError for anything but such a pair."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
        raise ValueError(f"{name} must yield (inputs, target), got {type(batch).__name__}{length}; give unpack=, a function of "
                         "the batch that returns such a pair")  # fmt: skip

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.to(device, non_blocking=True)
        if memory_format is not None and leaf.dim() == _DIMENSIONS.get(memory_format):
            return leaf.contiguous(memory_format=memory_format)
        return leaf

    inputs, target = tree_map(move, tuple(batch))
    return inputs, target


class BatchPreparer:
    """Brings a loader's batches to (inputs, target) on the device. unpack, memory_format: of `BilevelRunner`.

    Knows the batch placed `last` and which it is, `where`; the `time` alone is such as "epoch 1, step 3". Raises ValueError for
    anything but a pair, and, while `wary()`, for NaN and infinities.
    """

    def __init__(
        self,
        device: torch.device,
        memory_format: torch.memory_format | None,
        unpack: Callable[[Any], tuple[Any, Any]] | None,
        wary: Callable[[], bool],
    ) -> None:
        self.device, self.memory_format, self.unpack, self.wary = device, memory_format, unpack, wary
        self.last: tuple[Any, Any] = (None, None)
        self.where = self.time = ""

    def __call__(self, batch: Any, name: str, time: str) -> tuple[Any, Any]:
        """name: of the loader."""
        source = name if self.unpack is None else f"unpack of a batch of {name}"
        if self.unpack is not None:  # of a copy, for it may take things out, and recent batches are looked at again
            batch = self.unpack(copy.copy(batch) if isinstance(batch, (dict, list)) else batch)
        self.last = placed(batch, self.device, self.memory_format, source)
        self.where, self.time = f"a batch of {name} in {time}", time
        if self.wary():
            self.check()
        return self.last

    def check(self) -> None:
        """Raises ValueError where the last batch holds NaN or an infinity."""
        check_batch(self.last, self.where)


def part(batch: tuple[Any, Any], fraction: float) -> tuple[Any, Any]:
    """The first ⌈fraction · examples⌉ examples of a (shuffled) batch; fraction in (0, 1]."""
    if fraction == 1:
        return batch
    examples = batch_size(batch[0])
    count = math.ceil(examples * fraction)

    def cut(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == examples else leaf

    inputs, target = tree_map(cut, batch)
    return inputs, target
