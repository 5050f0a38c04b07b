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


def expand_rows(rows: Tensor, output: Tensor, batch_axis: BatchAxis) -> Tensor:
    """Rows, one per example, repeated to one per entry of `output` along the axis of its examples.

    rows: (batch, ...).
    output: a value with left · batch · right entries along that axis.
    batch_axis: where the examples are in `output`. A factor that stands alone on its side (left or right is 1) is read off the
        sizes: the number of windows follows the image.

    Returns (left · batch · right, ...). Raises ValueError when that axis is not made of the examples.
    """
    axis, left, right = batch_axis
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
