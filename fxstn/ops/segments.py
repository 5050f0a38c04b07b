"""Reductions of consecutive rows: the tangent of torch.segment_reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged


@staged
def segment_tangent(
    tangent: Tensor, data: Tensor, result: Tensor, reduce: str, lengths: Tensor | None, offsets: Tensor | None, axis: int = 0,
    unsafe: bool = False,
) -> Tensor:  # fmt: skip
    """Tangent of torch.segment_reduce. Of equal extremes each has an equal part, as for torch's backward.

    tangent, data: (…, rows, …), the rows along `axis`.
    result: (…, segments, …), the reduction of the data.
    reduce: "sum", "mean", "max" or "min".
    lengths, offsets: (…, segments) and (…, segments + 1), one of which is None.
    unsafe: whether there may be rows that belong to no segment.
    """

    def reduced(x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x, how, lengths=lengths, offsets=offsets, axis=axis, unsafe=unsafe, initial=0)

    if reduce in ("sum", "mean"):
        return reduced(tangent, reduce)
    if lengths is not None and lengths.dim() == 1 and not unsafe:
        chosen = data == result.repeat_interleave(lengths, 0)
    else:
        chosen = _equal_to_their_segment(data, result, _bounds(lengths) if offsets is None else offsets, axis)
    part = chosen.to(tangent.dtype)
    return reduced(part * tangent, "sum") / reduced(part, "sum").clamp(min=1)


def _bounds(lengths: Tensor | None) -> Tensor:
    """Offsets (…, segments + 1) of segments of these lengths."""
    assert lengths is not None
    return torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))


def _equal_to_their_segment(data: Tensor, result: Tensor, bounds: Tensor, axis: int) -> Tensor:
    """Whether each entry is that of its segment's result; False in rows of no segment."""
    if not result.numel():
        return torch.zeros_like(data, dtype=torch.bool)
    rows = torch.arange(data.shape[axis], device=data.device, dtype=bounds.dtype)
    segment = torch.searchsorted(bounds, rows.expand(*bounds.shape[:-1], -1).contiguous(), right=True) - 1
    segment = segment.view(*segment.shape, *[1] * (data.dim() - segment.dim()))
    inside = (segment >= 0) & (segment < result.shape[axis])
    index = segment.clamp(0, result.shape[axis] - 1).expand(data.shape)
    return (data == result.gather(axis, index)) & inside
