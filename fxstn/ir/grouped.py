"""Products of groups of rows with a matrix each, as layers of experts have them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@staged
def grouped_product(
    input: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """torch._grouped_mm, for types that it does not take, too.

    input: (rows, in).
    mat2: (groups, in, out).
    offs: (groups,), the row behind the last one of each group.

    Returns (rows, out).
    """
    if input.dtype in _TYPES or offs is None or input.dim() != 2 or mat2.dim() != 3:
        return torch._grouped_mm(input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    groups = [input[start:end] @ mat2[i] for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    return torch.cat([*groups, input.new_zeros(len(input) - ends[-1], mat2.shape[-1])])
