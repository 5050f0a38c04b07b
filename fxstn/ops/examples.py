"""Values with one row per example, put where the examples are in another value."""

from __future__ import annotations

from torch import Tensor

from fxstn.ir.tangents import BatchAxis


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
