"""λ-conditioned noise. Each draw is one node of the graph, shared by primal and tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.staging import staged


@staged
def dropout_mask(x: Tensor, p: Tensor | float, spatial: int = 0) -> Tensor | int:
    """Multiplier of inverted dropout: 0 with probability p, else 1/(1 − p).

    x: (batch, ...), what will be multiplied. p: in [0, 1]; a number, a 0-d tensor, or (batch,) with one rate per example.
    spatial: 0 for one draw per element; k for one per channel of a value with k dimensions after it.

    Returns a tensor that broadcasts with x, or 1 where x is not floating point: there is nothing to drop in indices.
    Raises ValueError when p has a rate per example but x has another number of examples.
    """
    if not x.is_floating_point():
        return 1
    leading = x.dim() if not spatial else max(1, min(2, x.dim() - spatial))  # (channels, ...) is an unbatched value
    shape = x.shape[:leading] + (1,) * (x.dim() - leading)
    noise = torch.rand(shape, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    if isinstance(p, Tensor):
        if p.dim() == 1 and p.shape[0] != x.shape[0]:
            raise ValueError(
                f"{p.shape[0]} dropout rates, one per example, for a value of shape {tuple(x.shape)}; pass a condition "
                "of shape (h,), or one row per example"
            )
        p = p.to(noise.dtype).view(-1, *[1] * (x.dim() - 1)) if p.dim() else p.to(noise.dtype)
        return noise.ge_(p).div_((1 - p).clamp_min(torch.finfo(noise.dtype).tiny)).to(x.dtype)
    return noise.ge_(p).div_(max(1 - p, torch.finfo(noise.dtype).tiny)).to(x.dtype)


@staged
def alpha_dropout_coefficients(x: Tensor, p: Tensor | float, spatial: int = 0) -> tuple[Tensor, Tensor]:
    """(multiplier, shift) of alpha dropout (Klambauer et al. 2017, Sec. "Alpha dropout"): y = x · multiplier + shift.

    Shapes and ranges as in `dropout_mask`; p < 1. Dropped units are set to SELU's lower limit and the result is rescaled
    to keep zero mean and unit variance.
    """
    limit = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
    kept = (dropout_mask(x, p, spatial) != 0).to(x.dtype)  # type: ignore[union-attr]
    if isinstance(p, Tensor):
        p = p.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) if p.dim() else p.to(x.dtype)
    gain = ((1 - p) * (1 + p * limit**2)) ** -0.5
    return kept * gain, (1 - kept) * (gain * limit) - gain * p * limit


@staged
def track_batch(num_batches_tracked: Tensor, momentum: float | None) -> float | Tensor:
    """Count one training batch of a batch norm and return the factor of its running average (None: cumulative)."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum
