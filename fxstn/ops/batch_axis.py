"""The examples of a batch: how many there are, and values with one row per example where another value has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from fxstn.ir.tangents import BatchAxis, Owners


def listed_examples(value: object) -> int | None:
    """The examples of a batch that lists them, as detectors take them: n images beside n dicts. None: it lists none."""
    entries = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(entries, (tuple, list)):
        return None
    if len(entries) == 2 and lists(entries[0], Tensor) and lists(entries[1], dict, len(entries[0])):
        return len(entries[0])
    for entry in entries:  # in a generator expression torch 2.11 could not compile it
        if (count := listed_examples(entry)) is not None:
            return count
    return None


def lists(value: Any, of: type | tuple[type, ...], length: int | None = None) -> bool:
    """Whether a value is a list or a tuple of objects of a type, so many of them; None: at least one."""
    if not isinstance(value, (tuple, list)) or not value or length not in (None, len(value)):
        return False
    return all(isinstance(entry, of) for entry in value)


def _leaves(value: object) -> Iterator[object]:
    """As torch's tree_iter, but faster for tuples and lists."""
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        for entry in cast(Sequence[object], value):
            yield from _leaves(entry)
    elif isinstance(value, Tensor):
        yield value
    else:
        yield from tree_iter(value)


def _alone(value: object) -> object:
    """The one entry of a structure, which is most batches: of a tuple or list, perhaps with an empty dict of inputs by name."""
    while isinstance(value, (tuple, list)) and value:
        if len(value) > 2 or (len(value) == 2 and (type(value[1]) is not dict or value[1])):
            return value
        value = value[0]
    return value


def batch_size(inputs: object) -> int:
    """Examples in a batch: as many as it lists, or dimension 0 of its first tensor. Raises ValueError where it holds none."""
    inputs = _alone(inputs)
    if isinstance(inputs, Tensor) and inputs.dim():
        return inputs.shape[0]
    if (count := listed_examples(inputs)) is not None:
        return count
    for leaf in _leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the inputs hold no tensor with a batch dimension")


def factors(size: int, batch: int, batch_axis: BatchAxis) -> tuple[int, int]:
    """(left, right) of an axis of so many entries, left · batch · right.

    A factor that stands alone on its side (left or right is 1) is read off the sizes: the number of windows follows the image.
    """
    _, left, right = batch_axis
    if left == 1:
        right = size // batch
    elif right == 1:
        left = size // batch
    return left, right


def expand_rows(rows: Tensor, output: Tensor, batch_axis: BatchAxis) -> Tensor:
    """Rows, one per example, repeated to one per entry of `output` along the axis of its examples.

    rows: (batch, ...).
    output: a value with left · batch · right entries along that axis.
    batch_axis: where the examples are in `output`.

    Returns (left · batch · right, ...). Raises ValueError when that axis is not made of the examples.
    """
    axis = batch_axis.axis
    batch, size = rows.shape[0], output.shape[axis] if axis < output.dim() else 0
    left, right = factors(size, batch, batch_axis)
    if not size or size != left * batch * right:
        raise ValueError(
            f"there are {batch} rows, one per example, but a value of shape {tuple(output.shape)} does not have the batch "
            f"along dimension {axis}; pass delta and condition of shape (h,) for all examples"
        )
    if left == right == 1:
        return rows
    return rows[None, :, None].expand(left, batch, right, *rows.shape[1:]).reshape(size, *rows.shape[1:])


def with_mean(rows: Tensor) -> Tensor:
    """(batch + 1, ...): the rows of the examples, and their mean for what is no example's."""
    return torch.cat((rows, rows.mean(0, keepdim=True)))


def row_numbers(owners: Owners, batch: int) -> Tensor:
    """Which row of `with_mean` each entry reads."""
    return torch.where(owners.numbers < 0, batch, owners.numbers)


def picked_rows(rows: Tensor, owners: Owners) -> Tensor:
    """Of (batch, ...) values, each of which broadcasts with a result, what each entry of the result reads.

    Where a value has one entry along the axes of the examples, only these are made.
    """
    rank = owners.numbers.dim()
    rows = rows.reshape(len(rows), *[1] * (rank - rows.dim() + 1), *rows.shape[1:])
    sizes, numbers = rows.shape[1:], owners.numbers
    if all(n == 1 or m == 1 for n, m in zip(sizes, numbers.shape, strict=True)):
        picked = with_mean(rows)[row_numbers(owners, len(rows))]  # (*numbers.shape, *sizes)
        order = [dim for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for dim in pair]
        return picked.permute(order).reshape([n * m for n, m in zip(sizes, numbers.shape, strict=True)])
    shape = torch.broadcast_shapes(sizes, numbers.shape)
    index = row_numbers(owners, len(rows)).expand(shape)
    return with_mean(rows).expand(-1, *shape).gather(0, index[None])[0]
