"""Batches: moved to the device, laid out, checked, cut to a part."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxstn.bilevel.target_rows import target_in
from fxstn.ir.input_errors import first_line
from fxstn.ops.batch_axis import batch_size, listed_examples, lists

Batch = tuple[Any, Any]  # (inputs, target)
_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def to_device(
    batch: object, device: torch.device, memory_format: torch.memory_format | None, name: str = "a loader"
) -> Batch:
    """(inputs, target) on the device, images in the memory format; tensors of `torch.inference_mode` as clones.

    name: what the error calls the source of the batch.

    Raises ValueError where the batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, Sized) and getattr(batch, "shape", None) != () else ""
        raise ValueError(f"{name} must yield (inputs, target), got {type(batch).__name__}{length}; give unpack=, a function of "
                         "the batch that returns such a pair")  # fmt: skip

    def move(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.to(device, non_blocking=True)
        leaf = leaf.clone() if leaf.is_inference() else leaf  # such as features computed under inference_mode
        if memory_format is not None and leaf.dim() == _DIMENSIONS.get(memory_format):
            return leaf.contiguous(memory_format=memory_format)
        return leaf

    inputs, target = tree_map(move, tuple(map(as_dict, batch)))
    return inputs, target


def as_dict(value: Any) -> Any:
    """A mapping as a dict, through which torch's functions on structures go; anything else as it is."""
    return dict(value) if isinstance(value, Mapping) and type(value) not in (dict, OrderedDict) else value


def check_finite(batch: Batch, place: str) -> None:
    """Raises ValueError when a batch holds NaN or an infinity.

    place: what the error calls the batch.
    """
    for part, value in zip(("inputs", "target"), batch, strict=True):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
                rows = leaf.reshape(len(leaf), -1) if leaf.dim() else leaf[None, None]
                bad = (~torch.isfinite(rows)).any(1).nonzero()
                raise ValueError(f"{place} has {part} that are NaN or infinite (row {int(bad[0])} of shape "
                                 f"{tuple(leaf.shape)}); mend or drop these examples")  # fmt: skip


def unpack_of(network: object) -> Callable[[Any], Batch] | None:
    """How a network's own model reads a batch: its method `unpack_batch`. None: it has none, batches are (inputs, target)."""
    return getattr(getattr(network, "model", None), "unpack_batch", None)


class Whole:
    """A part of a batch, beside its tensors, that says that it is not cut."""


class BatchPreparer:
    """Prepares a loader's batches: unpacks them and moves them to the device.

    memory_format, unpack: of `BilevelRunner`.

    `last` is the batch prepared last, `place` its name, such as "a batch of train_loader in epoch 1, step 3", and `time` the
    end of that.
    `check_finite`: whether every batch is checked for NaN and infinities.
    """

    def __init__(
        self,
        device: torch.device,
        memory_format: torch.memory_format | None,
        unpack: Callable[[Any], Batch] | None,
    ) -> None:
        self.device, self.memory_format, self.unpack = device, memory_format, unpack
        self.check_finite = False
        self.last: Batch = (None, None)
        self.place = self.time = ""

    def __call__(self, batch: object, name: str, time: str) -> Batch:
        """(inputs, target) on the device.

        name: of the loader.
        time: epoch and step, for errors.

        Raises ValueError where the batch is not a pair, and for NaN and infinities where they are checked.
        """
        source = name if self.unpack is None else f"unpack of a batch of {name}"
        if self.unpack is not None:  # of a copy: it may take things out, and recent batches are read again
            batch = self._unpacked(batch, name)
        self.last = to_device(batch, self.device, self.memory_format, source)
        self.place, self.time = f"a batch of {name} in {time}", time
        if self.check_finite:
            self.check()
        return self.last

    def _unpacked(self, batch: object, name: str) -> Batch:
        """What unpack makes of a batch. Raises ValueError where it cannot take the batch."""
        assert self.unpack is not None
        try:
            return self.unpack(copy.copy(batch) if isinstance(batch, (dict, list)) else batch)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"unpack fails on a batch of {name} ({type(error).__name__}: {first_line(error)}), which is a "
                             f"{type(batch).__name__}; it must return (inputs, target)") from error  # fmt: skip

    def check(self) -> None:
        """Raises ValueError where the last batch holds NaN or an infinity."""
        check_finite(self.last, self.place)


def first_part(batch: Batch, fraction: float, least: int = 1) -> Batch:
    """The first ⌈fraction · examples⌉ examples of a (shuffled) batch, or as many as `least`; fraction in (0, 1].

    All of them where a part would be no batch, as with `parts_of`.
    """
    examples = batch_size(batch[0])
    if fraction == 1 or not _can_be_cut(batch, examples):
        return batch
    count = max(math.ceil(examples * fraction), least)

    inputs, target = _rows(batch, slice(count), examples)
    return inputs, target


def parts_of(batch: Any, size: int) -> list[Any]:
    """A batch in parts of about `size` examples; the batch itself where it is no larger, or where its examples are not
    rows of tensors that torch's functions on structures find (an object of somebody else's), or where rows refer to others:
    in sparse tensors, by whole numbers of which there are not as many as examples (edges of a graph, offsets of bags), or in a
    target with other rows (one for each graph, or for each token)."""
    batch = as_dict(batch)
    if not any(isinstance(leaf, Tensor) and leaf.dim() for leaf in tree_leaves(batch)):
        return [batch]
    examples = batch_size(batch)
    if not _can_be_cut(batch, examples):
        return [batch]
    count = max(1, round(examples / size))
    bounds = [number * examples // count for number in range(count + 1)]
    return [_rows(batch, slice(*pair), examples) for pair in itertools.pairwise(bounds)] if count > 1 else [batch]


def _can_be_cut(batch: object, examples: int) -> bool:
    """Whether the rows of a batch's tensors are its examples, or what all examples share."""
    all_leaves = tree_leaves(batch)
    tensors = [leaf for leaf in all_leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if any(tensor.layout is not torch.strided for tensor in tensors) or any(isinstance(x, Whole) for x in all_leaves):
        return False
    if listed_examples(batch) is not None:
        return True
    target = target_in(batch)
    return all(x.shape[0] in (1, examples) or (x is not target and not _is_whole(x)) for x in tensors)


def _is_whole(x: Tensor) -> bool:
    """Whether a tensor holds whole numbers, which may say which rows belong together."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def _rows(batch: Any, chosen: slice, examples: int) -> Any:
    """Some of the examples of a batch that has so many."""

    is_listed = listed_examples(batch) is not None

    def is_list(value: object) -> bool:
        return is_listed and lists(value, (Tensor, dict), examples)

    def cut(leaf: Any) -> object:
        of_tensor = isinstance(leaf, Tensor) and not is_listed and leaf.dim() and leaf.shape[0] == examples
        return leaf[chosen] if of_tensor or is_list(leaf) else leaf

    return tree_map(cut, batch, is_leaf=is_list)
