"""Sparse matrices, of graph networks say: products with them, and matrices whose values are computed."""

from __future__ import annotations

import torch

from fxstn.ir.staging import call
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import linear, rule, total


@rule(torch.sparse.mm, kind="bilinear", fresh=True)
def product(d, mat1, mat2, reduce="sum"):
    if reduce not in ("sum", "mean"):
        raise NoRule(f"a product with reduce={reduce!r} is not linear")
    settings = () if reduce == "sum" else (reduce,)
    times = lambda a, b: call(torch.sparse.mm, a, b, *settings)  # noqa: E731
    return times(mat1, mat2), total((d.mat1, lambda da: times(da, mat2)), (d.mat2, lambda db: times(mat1, db)))


@rule(torch.sparse.addmm, fresh=True)
def product_and_sum(d, mat, mat1, mat2, *, beta=1.0, alpha=1.0):
    times = lambda a, b: call(torch.sparse.mm, a, b) * alpha  # noqa: E731
    y = call(torch.sparse.addmm, mat, mat1, mat2, beta=beta, alpha=alpha)
    return y, total(
        (d.mat, lambda dm: dm * beta), (d.mat1, lambda da: times(da, mat2)), (d.mat2, lambda db: times(mat1, db))
    )


@rule(torch.sparse_coo_tensor, kind="linear")
def matrix_of_values(d, indices, values, *settings, **named):
    matrix = lambda x: call(torch.sparse_coo_tensor, indices, x, *settings, **named)  # noqa: E731
    return matrix(values), matrix(d.values)


linear(torch.Tensor.to_dense)
