"""The examples of a batch: how many there are, and values with one row per example where another value has them."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxstn.ir.tangents import BatchAxis


def batch_size(inputs: object) -> int:
    """Examples in a batch: dimension 0 of its first tensor. Raises ValueError when it holds no tensor."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the inputs hold no tensor with a batch dimension")


def along_examples(rows: Tensor, output: Tensor, place: BatchAxis) -> Tensor:
    """rows (batch, ...) → (left · batch · right, ...), as many as `output` has entries along the axis of its examples.

    A factor that stands alone on its side (left or right is 1) is read off the sizes: the number of windows follows the
    image. Raises ValueError when that axis is not made of the examples.
    """
    axis, left, right = place
    batch, size = rows.shape[0], output.shape[axis] if axis < output.dim() else 0
    if left == 1:
        right = size // batch
    elif right == 1:
        left = size // batch
    if not size or size != left * batch * right:
        raise ValueError(
            f"there are {batch} rows, one per example, but a value of shape {tuple(output.shape)} does not have the batch "
            f"along dimension {axis}; pass delta and condition of shape (h,) for all examples"
        )
    if left == right == 1:
        return rows
    return rows[None, :, None].expand(left, batch, right, *rows.shape[1:]).reshape(size, *rows.shape[1:])
