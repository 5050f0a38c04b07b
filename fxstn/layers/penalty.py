"""Penalties on the weights, in closed form on the structured response."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_penalty(weight: Tensor, strength: Tensor) -> Tensor:
    """½ λ ‖w‖², a scalar. strength: λ ≥ 0, 0-d."""
    return 0.5 * strength * torch.linalg.vector_norm(weight).square()


def l2_penalty_perturbed(weight: Tensor, strength: Tensor, scale: Tensor, response: Tensor, axis: int = 0) -> Tensor:
    """Mean over the batch of ½ λ_i ‖w + s_i ⊙row R‖², without per-example weights.

    weight, response: of one shape. strength: 0-d or (batch,). scale: (rows,) or (batch, rows), scales s_i along `axis`.
    Uses ‖W_r + s_r R_r‖² = ‖W_r‖² + 2 s_r ⟨W_r, R_r⟩ + s_r² ‖R_r‖² per row r.
    """
    w, r = (value.movedim(axis, 0).flatten(1) for value in (weight, response))
    cross, square = torch.linalg.vecdot(w, r), torch.linalg.vecdot(r, r)
    norms = torch.linalg.vecdot(w, w).sum() + 2 * scale @ cross + scale.square() @ square
    return 0.5 * (strength * norms).mean()
