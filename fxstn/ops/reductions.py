"""Tangents of reductions whose formula depends on the rank or on which dimensions are reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.staging import staged
from fxstn.ops.complex_numbers import real_product

Dims = int | Sequence[int] | None


def _dims(x: Tensor, dim: Dims) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def or_infinity(divisor: Any) -> Any:
    """A divisor, infinite where it is 0: the quotient, and what is pulled back through it, is 0 there, as torch has it."""
    return torch.where(divisor == 0, torch.inf, divisor)


@staged
def vector_norm_tangent(tangent: Tensor, x: Tensor, p: float, dim: Dims, keepdim: bool) -> Tensor:
    """Tangent of (Σ |x|^p)^(1/p) over `dim` (None: all): Σ sgn(x) (|x|/‖x‖)^(p−1) dx; 0 where the norm is 0.

    For p = ±inf the mean over the entries that attain it.
    """
    dims = _dims(x, dim)
    if p == 0:
        return torch.zeros_like(x.real.sum(dims, keepdim))
    norm = torch.linalg.vector_norm(x, p, dims, keepdim=True)
    if abs(p) == float("inf"):
        attained = (x.abs() == norm).to(x.dtype)
        weights = torch.sgn(x) * attained / attained.sum(dims, keepdim=True)
    elif p == 1:
        weights = torch.sgn(x)
    else:
        ratio = x / or_infinity(norm)
        weights = ratio if p == 2 else torch.sgn(x) * torch.where(x == 0, 0, ratio.abs() ** (p - 1))
    return real_product(weights, tangent).sum(dims, keepdim)


@staged
def variance_tangent(tangent: Tensor, x: Tensor, dim: Dims, correction: float, keepdim: bool) -> Tensor:
    """Tangent of the variance of x over `dim` (None: all): 2 Σ Re conj(x − mean) dx / (n − correction).

    The factor is infinite where there is no degree of freedom, as torch has it: not a number, as the variance of one value.
    """
    dims = _dims(x, dim)
    centred = x - x.mean(dims, keepdim=True)
    freedom = (math.prod(x.shape[axis] for axis in dims) if x.dim() else 1) - correction
    return real_product(centred, tangent).sum(dims, keepdim) * (2 / freedom if freedom else math.inf)


@staged
def softmax_weighted(tangent: Tensor, x: Tensor, y: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """Σ exp(x − y) dx over `dim`: the tangent of y = logsumexp(x). 0 where every entry is −inf."""
    dims = _dims(x, dim)
    peak = y if keepdim else torch.logsumexp(x, dims, keepdim=True)
    return (torch.where(peak == -torch.inf, 0, torch.exp(x - peak)) * tangent).sum(dims, keepdim)


@staged
def attained_tangent(tangent: Tensor, x: Tensor, y: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """Mean of the tangent over the entries of x that attain the extremum y along `dim` (None: all)."""
    dims = _dims(x, dim)
    if not keepdim and x.dim():
        for axis in sorted(axis % x.dim() for axis in dims):
            y = y.unsqueeze(axis)
    attained = (x == y).to(tangent.dtype)
    return (attained * tangent).sum(dims, keepdim) / attained.sum(dims, keepdim)


@staged
def product_tangent(tangent: Tensor, x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    """Tangent of the product of x over one dimension (None: all): Σᵢ dxᵢ Π_{j≠i} xⱼ, by products from both ends, so that
    zeros among the factors are no exception."""
    if not x.dim():
        return tangent
    if dim is None:
        tangent, x, dim = tangent.flatten(), x.flatten(), 0
    ones = x.new_ones([1 if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)])
    before = torch.cat([ones, x], dim).cumprod(dim).narrow(dim, 0, x.shape[dim])
    after = torch.cat([ones, x.flip(dim)], dim).cumprod(dim).narrow(dim, 0, x.shape[dim]).flip(dim)
    return (tangent * before * after).sum(dim, keepdim)


@staged
def angle_tangent(tangent: Tensor, x: Tensor) -> Tensor:
    """Tangent of the angle of complex x: Im(conj(x) dx)/|x|²; that of a real number is 0 or π."""
    if not x.is_complex():
        return tangent * 0
    return (x.conj() * tangent).imag / or_infinity(x.real * x.real + x.imag * x.imag)


@staged
def cumulative_product_tangent(tangent: Tensor, x: Tensor, dim: int) -> Tensor:
    """Tangent of the cumulative product of x along `dim`, without divisions: log₂ n products of neighbouring runs."""
    size, step = x.shape[dim] if x.dim() else 1, 1
    while step < size:
        own, (before, change) = size - step, (value.narrow(dim, 0, size - step) for value in (x, tangent))
        moved = before * tangent.narrow(dim, step, own) + change * x.narrow(dim, step, own)
        tangent = torch.cat([tangent.narrow(dim, 0, step), moved], dim)
        x = torch.cat([x.narrow(dim, 0, step), before * x.narrow(dim, step, own)], dim)
        step *= 2
    return tangent


@staged
def distance_tangent(tangent: Tensor, x: Tensor, other: Tensor, distance: Tensor, p: float) -> Tensor:
    """Tangent in x of the p-distances between the rows of x (..., P, M) and of other (..., R, M), distance (..., P, R).

    p = 2 by two matrix products; 0 where the distance is 0.
    """
    if p == 2:
        product = (x * tangent).sum(-1, keepdim=True) - torch.matmul(tangent, other.mT)
        return product / or_infinity(distance)
    return vector_norm_tangent(tangent.unsqueeze(-2), x.unsqueeze(-2) - other.unsqueeze(-3), p, -1, False)
