"""Penalties on the weights, in closed form on the structured response."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(weight: Tensor, strength: Tensor, norm: int = 2) -> Tensor:
    """½ λ ‖w‖², or λ ‖w‖₁ for norm 1, a scalar. strength: λ ≥ 0, 0-d."""
    if norm == 1:
        return strength * weight.abs().sum()
    return 0.5 * strength * torch.linalg.vector_norm(weight).square()


def penalty_perturbed(
    weight: Tensor, strength: Tensor, scale: Tensor, response: Tensor, axis: int = 0, norm: int = 2
) -> Tensor:
    """Mean over the batch of the penalty at w + s_i ⊙row R, without per-example weights.

    weight, response: of one shape. strength: 0-d or (batch,). scale: (rows,) or (batch, rows), scales s_i along `axis`.
    Norm 2 uses ‖W_r + s_r R_r‖² = ‖W_r‖² + 2 s_r ⟨W_r, R_r⟩ + s_r² ‖R_r‖² per row r; norm 1 is linearised at w, which is
    exact until an entry changes its sign: ‖W_r‖₁ + s_r ⟨sign W_r, R_r⟩.
    """
    w, r = (value.movedim(axis, 0).flatten(1) for value in (weight, response))
    if norm == 1:
        return (strength * (w.abs().sum() + scale @ torch.linalg.vecdot(w.sign(), r))).mean()
    cross, square = torch.linalg.vecdot(w, r), torch.linalg.vecdot(r, r)
    norms = torch.linalg.vecdot(w, w).sum() + 2 * scale @ cross + scale.square() @ square
    return 0.5 * (strength * norms).mean()
