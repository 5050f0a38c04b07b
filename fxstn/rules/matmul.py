"""Products: multilinear in their operands, dy = Σ f(a, …, db, …, c)."""

from __future__ import annotations

import operator

import torch

from fxstn.ir.grouped import grouped_product
from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import expand_like
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


def _register_added_product(function):
    @rule(function)
    def added_product(d, input, a, b, *, beta=1, alpha=1):
        """beta·input + alpha·a b; each further term is added by the same fused operation."""
        y = function(input, a, b, beta=beta, alpha=alpha)
        dy = d.input if d.input is ZERO or beta == 1 else beta * d.input
        for da, db in ((d.a, b), (a, d.b)):
            if da is not ZERO and db is not ZERO:
                dy = function(input if dy is ZERO else dy, da, db, beta=0 if dy is ZERO else 1, alpha=alpha)
        return y, expand_like(dy, y)


for function in (torch.addmm, torch.addmv, torch.baddbmm, torch.addbmm, torch.addr):
    _register_added_product(function)
