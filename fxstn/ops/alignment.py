"""The loss of all alignments of two sequences (CTC, Graves et al. 2006): its tangent by torch's own backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.precision import wide

Lengths = Tensor | Sequence[int]


@staged
def ctc_tangent(
    tangent: Tensor, log_probs: Tensor, targets: Tensor, input_lengths: Lengths, target_lengths: Lengths, blank: int,
    reduction: str, zero_infinity: bool,
) -> Tensor:  # fmt: skip
    """Tangent of F.ctc_loss in the log-probabilities.

    tangent, log_probs: (time, batch, classes), or (time, classes) of one sequence.
    targets, input_lengths, target_lengths, blank, reduction, zero_infinity: as of F.ctc_loss.

    Returns a number, or (batch,) for reduction "none".
    """
    batched, dtype = log_probs.dim() == 3, wide(log_probs.dtype)
    values, change = (x.to(dtype) if batched else x.to(dtype).unsqueeze(1) for x in (log_probs, tangent))
    targets = targets if batched or targets.dim() != 1 else targets.unsqueeze(0)
    lengths = [torch.as_tensor(n, device=values.device).reshape(-1) for n in (input_lengths, target_lengths)]
    settings = (values, targets, *lengths)
    loss, paths = torch.ops.aten._ctc_loss(*settings, blank, zero_infinity)
    gradient = torch.ops.aten._ctc_loss_backward(torch.ones_like(loss), *settings, loss, paths, blank, zero_infinity)
    counts = torch.arange(len(values), device=values.device)[:, None, None] < lengths[0][:, None]
    gradient = gradient - values.exp() * counts  # torch's is that of a softmax before, which has this term of its own
    result = (gradient * change).sum((0, 2))
    if reduction == "mean":
        return (result / lengths[1].to(result).clamp(min=1)).mean()
    return result.sum() if reduction == "sum" else result if batched else result.squeeze(0)
