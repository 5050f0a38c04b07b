"""The three objectives of Δ-STN (paper, Alg. 1), each a scalar to call .backward() on, and a loss that reads λ."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from fxstn.bilevel import losses
from fxstn.bilevel.counts import IGNORED
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.perturbation import Perturb
from fxstn.network import SelfTuningNetwork


def cross_entropy(output: Tensor, target: Tensor, hparams: Mapping[str, Tensor] | None = None) -> Tensor:
    """`F.cross_entropy`, with the label smoothing of each example where `hparams` has "label_smoothing".

    output: (batch, classes, ...), logits.
    target: (batch, ...), classes, or (batch, classes, ...), probabilities. The class -100 does not count.
    hparams: {name: (batch,)}. None, as in the hyper step and in evaluation: the plain loss.

    Returns a scalar, the mean over the entries of the target that count.
    """
    each = F.cross_entropy(output, target, reduction="none")
    smoothing = None if hparams is None else hparams.get("label_smoothing")
    if smoothing is not None:
        smoothing = smoothing.view(-1, *[1] * (each.dim() - 1))
        each = each + smoothing * (-F.log_softmax(output, 1).mean(1) - each)
    if target.is_floating_point():
        return each.mean()
    mask = target != IGNORED
    return each.where(mask, 0).sum() / mask.sum()


def general_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto"
) -> Tensor:
    """L_T(λ₀, f(x; w₀, λ₀)) (paper, Eq. 3.9): a plain training loss, for w₀.

    stn: from `fxstn.transform`.
    loss_fn: loss_fn(output, target) → scalar, the mean over the batch, or (sum, count).
    inputs: a tensor (batch, ...), a tuple of inputs by position, or a dict of inputs by name, as for `transform`.
    target: what loss_fn takes.
    perturb: as in `response_loss`, for method "stn" only. There this is the one objective of all parameters, L_T at λ + ε
        (MacKay et al. 2019); the other methods draw no perturbation here.
    """
    return losses.general_loss(stn, loss_fn, inputs, target, perturb=perturb).total()


def response_loss(
    stn: SelfTuningNetwork, loss_fn: LossFunction, inputs: object, target: object, *, perturb: Perturb = "auto",
    widening: float = 1.0,
) -> Tensor:  # fmt: skip
    """L_T(λ₀ + ε, y + dy) (paper, Eq. 3.10 and 3.13), for Θ; w₀ gets no gradient and running statistics stay.

    stn, loss_fn, inputs, target: as in `general_loss`.
    perturb: "example" draws one ε per example (the paper), "batch" one for all examples. "auto" draws one per example, unless
        the network moves the batch dimension where it cannot be followed. Or ε itself, (batch, h) or (h,).
    widening: ≥ 1, how many times σ at most ε has near the ends of a range, where a change of λ changes little (the paper: 1).
    """
    return losses.response_loss(stn, loss_fn, inputs, target, perturb=perturb, widening=widening).total()


def hyper_loss(
    stn: SelfTuningNetwork,
    loss_fn: LossFunction,
    inputs: object,
    target: object,
    *,
    entropy_weight: float = 1e-3,
    perturb: Perturb = "auto",
) -> Tensor:
    """L_V(y + dy) − τ H[ε] (paper, Eq. 2.7 with 3.13), for λ and σ; w₀ and Θ get no gradient.

    stn, loss_fn, inputs, target: as in `response_loss`, of validation data.
    entropy_weight: τ ≥ 0.
    perturb: as in `response_loss`, or "off": ε = 0, the gradient at λ itself, Θᵀ ∇L_V by the network's own backward pass. σ
        gets its gradient from the entropy alone.

    The network is in eval mode. With method "delta", batch norms normalise by this batch all the same, as where Θ was learned
    (`transform`, statistics). A loss_fn that takes `hparams` gets None: L_V must not read λ, or λ would minimise it directly.
    """
    return losses.hyper_loss(stn, loss_fn, inputs, target, entropy_weight=entropy_weight, perturb=perturb).total()
