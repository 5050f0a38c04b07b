"""Reductions of consecutive rows: the tangent of torch.segment_reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged


@staged
def segment_tangent(
    tangent: Tensor, data: Tensor, result: Tensor, reduce: str, lengths: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """Tangent of torch.segment_reduce along dimension 0. Of equal extremes each has an equal part, as for torch's backward.

    tangent, data: (rows, …).
    result: (segments, …), the reduction of the data.
    reduce: "sum", "mean", "max" or "min".
    lengths, offsets: (segments,) and (segments + 1,), one of which is None.
    """

    def reduced(x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x, how, lengths=lengths, offsets=offsets, initial=0)

    if reduce in ("sum", "mean"):
        return reduced(tangent, reduce)
    counts = offsets.diff() if offsets is not None else lengths
    assert counts is not None
    chosen = (data == result.repeat_interleave(counts, 0)).to(tangent.dtype)
    return reduced(chosen * tangent, "sum") / reduced(chosen, "sum").clamp(min=1)
