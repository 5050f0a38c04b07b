"""Losses and distances, where a forward computes them itself (detection, language models)."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fxstn.ir.staging import call
from fxstn.ir.tangents import ZERO
from fxstn.ops.alignment import ctc_tangent
from fxstn.ops.kernels import separable_loss
from fxstn.ops.reductions import distance_tangent, vector_norm_tangent
from fxstn.rules.registry import RULES, filled, register, rule, total

Function = Callable[..., Any]


# Of all entries these make one number, unless an argument at this position says along which dimensions.
_REDUCTIONS = {
    torch.mean: 1,
    torch.sum: 1,
    torch.prod: 1,
    torch.linalg.vector_norm: 2,
    torch.linalg.norm: 2,
    torch.norm: 2,
}


def is_loss(function: Function) -> bool:
    """Whether a function is one of the losses of torch.nn.functional."""
    return function in RULES and RULES[function].kind == "loss"


def is_layer(function: Function) -> bool:
    """Whether a function is a layer or a norm, which may read parameters with a response."""
    return function in RULES and bool(RULES[function].reads)


def reduces_to_a_number(function: Function, args: tuple, kwargs: Mapping[str, object]) -> bool:
    """Whether a call is certain to return one number: a sum, mean or norm of all entries of a tensor."""
    if function not in _REDUCTIONS:
        return False
    position = _REDUCTIONS[function]
    return (args[position] if len(args) > position else kwargs.get("dim")) in (None, (), [])


LABELS = {F.hinge_embedding_loss: 1, F.cosine_embedding_loss: 2}  # which argument is compared with 1 and −1, no more


def _register_loss(function, classes=None):
    label = LABELS.get(function)

    def apply(tangents, args, kwargs):
        varying = tuple(None if tangent is ZERO or i == label else tangent for i, tangent in enumerate(tangents))
        if not any(tangent is not None for tangent in varying):
            return call(function, *args, **kwargs), ZERO
        both = separable_loss(function, classes)(args, kwargs, varying)
        return operator.getitem(both, 0), operator.getitem(both, 1)

    register(function, "loss", apply, inspect.signature(function), fresh=True)


for function in (
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss),
    *(F.huber_loss, F.gaussian_nll_loss, F.poisson_nll_loss, F.soft_margin_loss, F.hinge_embedding_loss),
    *(F.margin_ranking_loss, F.multilabel_soft_margin_loss, F.cosine_embedding_loss, F.triplet_margin_loss),
):
    _register_loss(function)
_register_loss(F.cross_entropy, classes=1)
_register_loss(F.nll_loss, classes=1)
_register_loss(F.multi_margin_loss, classes=-1)
_register_loss(F.multilabel_margin_loss, classes=-1)


def _register_ctc(function, reductions):
    @rule(function, kind="loss", fresh=True)
    def ctc(
        d, log_probs, targets, input_lengths, target_lengths, blank=0, reduction=reductions["mean"], zero_infinity=False
    ):  # fmt: skip
        lengths = (targets, input_lengths, target_lengths)
        how = next(name for name, own in reductions.items() if own == reduction)
        y = function(log_probs, *lengths, blank, reduction, zero_infinity)
        return y, ctc_tangent(d.log_probs, log_probs, *lengths, blank, how, zero_infinity)


_register_ctc(F.ctc_loss, {name: name for name in ("none", "mean", "sum")})
_register_ctc(torch.ctc_loss, {"none": 0, "mean": 1, "sum": 2})


@rule(F.pairwise_distance, fresh=True)
def pairwise_distance(d, x1, x2, p=2.0, eps=1e-6, keepdim=False):
    y = F.pairwise_distance(x1, x2, p, eps, keepdim)
    return y, vector_norm_tangent(filled(d.x1, x1) - filled(d.x2, x2), x1 - x2 + eps, p, -1, keepdim)


@rule(torch.cdist, fresh=True)
def cdist(d, x1, x2, p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary"):
    y = torch.cdist(x1, x2, p, compute_mode)
    return y, total(
        (d.x1, lambda dx: distance_tangent(dx, x1, x2, y, p)),
        (d.x2, lambda dx: distance_tangent(dx, x2, x1, y.mT, p).mT),
    )
