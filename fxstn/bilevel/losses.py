"""Loss functions that read tuned hyperparameters, one value per example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(output: Tensor, target: Tensor, hparams: Mapping[str, Tensor] | None = None) -> Tensor:
    """`F.cross_entropy` with the label smoothing of each example, where `hparams` has "label_smoothing".

    output: (batch, classes) logits. target: (batch,) classes, or (batch, classes) probabilities. hparams: name → (batch,);
    None, as in the hyper step and in evaluation, is the plain loss. Returns a scalar, the mean over the batch.
    """
    losses = F.cross_entropy(output, target, reduction="none")
    smoothing: Any = (hparams or {}).get("label_smoothing")
    if smoothing is not None:
        losses = losses + smoothing * (-F.log_softmax(output, -1).mean(-1) - losses)
    return losses.mean()
