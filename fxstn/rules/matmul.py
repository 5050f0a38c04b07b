"""Products: multilinear in their operands, dy = Σ f(a, …, db, …, c); and determinants."""

from __future__ import annotations

import operator

import torch

from fxstn.ir.grouped import grouped_product
from fxstn.ops.determinant import determinant_tangent
from fxstn.rules.registry import bilinear, rule, total

bilinear(operator.matmul, torch.inner, torch.kron, torch.linalg.cross)
bilinear(torch.bmm, torch.mm, second="mat2")
bilinear(torch.outer, second="vec2")
bilinear(torch.mv, second="vec")
bilinear(torch.dot, second="tensor")
bilinear(torch.vdot)
bilinear(torch.linalg.vecdot, second="y")
bilinear(torch.tensordot, second="b")
bilinear(grouped_product, second="mat2")


@rule(torch.einsum)
def einsum(d, equation, *operands):
    packed = len(operands) == 1 and isinstance(operands[0], (list, tuple))
    values, tangents = (operands[0], d.operands[0]) if packed else (operands, d.operands)
    product = lambda i, dx: torch.einsum(equation, *values[:i], dx, *values[i + 1 :])  # noqa: E731
    terms = [(dx, lambda dx, i=i: product(i, dx)) for i, dx in enumerate(tangents)]
    return torch.einsum(equation, *values), total(*terms)


@rule(torch.det, fresh=True)
def determinant(d, input):
    return torch.det(input), determinant_tangent(d.input, input)


@rule(torch.linalg.det, fresh=True)
def linalg_determinant(d, A):
    return torch.linalg.det(A), determinant_tangent(d.A, A)
