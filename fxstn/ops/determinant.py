"""The tangent of a determinant, also of a singular matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fxstn.ir.staging import staged


@staged
def determinant_tangent(tangent: Tensor, matrix: Tensor) -> Tensor:
    """tr(adj(A) dA), (...), of matrices A, (..., n, n).

    From A = U S Vᴴ: adj(A) = det(U Vᴴ) V Π Uᴴ, where entry i of the diagonal Π is the product of the other singular values.
    So nothing is divided by. torch's forward mode solves with A, and fails where it is singular.
    """
    left, values, right = torch.linalg.svd(matrix)
    ones = torch.ones_like(values[..., :1])
    before = torch.cat((ones, values[..., :-1]), -1).cumprod(-1)
    after = torch.cat((ones, values[..., 1:].flip(-1)), -1).cumprod(-1).flip(-1)
    moved = (left.mH @ tangent @ right.mH).diagonal(dim1=-2, dim2=-1)
    return torch.linalg.det(left) * torch.linalg.det(right) * (before * after * moved).sum(-1)
