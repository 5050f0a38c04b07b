"""Reductions: sums, moments, norms, extrema, and what selects by order."""

from __future__ import annotations

import operator

import torch

from fxstn.ir.tangents import ZERO
from fxstn.ops.kernels import cast_tangent
from fxstn.ops.reductions import (
    attained_tangent,
    cumulative_product_tangent,
    or_infinity,
    product_tangent,
    softmax_weighted,
    variance_tangent,
    vector_norm_tangent,
)
from fxstn.ops.segments import segment_tangent
from fxstn.rules.fallback import NoRule, fallback
from fxstn.rules.registry import apply_rule, linear, rule, transposed

linear(torch.mean, torch.sum, torch.cumsum, torch.trace)
transposed(torch.linalg.matrix_norm, torch.renorm)
transposed(torch.linalg.eigh)  # what its forward mode gives cannot be differentiated
transposed(torch.scatter_reduce)  # its forward mode is wrong for products (torch 2.15)


def _moment_settings(dim=None, unbiased=None, keepdim=False, *, correction=None, axis=None):
    """(dim, correction, keepdim) of the three ways to call var: (dim, correction=), (dim, unbiased), (unbiased)."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return axis if dim is None else dim, correction, keepdim


def _register_moment(function, root, with_mean):
    @rule(function, fresh=True)
    def moment(d, input, *settings, **named):
        y = function(input, *settings, **named)
        dim, correction, keepdim = _moment_settings(*settings, **named)
        dy = variance_tangent(d.input, input, dim, correction, keepdim)
        spread = operator.getitem(y, 0) if with_mean else y
        dy = dy / or_infinity(2 * spread) if root else dy
        return y, (dy, torch.mean(d.input, dim, keepdim=keepdim)) if with_mean else dy


for function, root, with_mean in (
    (torch.var, False, False),
    (torch.std, True, False),
    (torch.var_mean, False, True),
    (torch.std_mean, True, True),
):
    _register_moment(function, root, with_mean)


def _converted(dtype, *values):
    """What is reduced, in the type that the reduction is computed in."""
    return values if dtype is None else tuple(value.to(dtype) for value in values)


@rule(torch.linalg.vector_norm)
def vector_norm(d, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    y = torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype)
    dx, x = _converted(dtype, d.x, x)
    return y, vector_norm_tangent(dx, x, ord, dim, keepdim)


@rule(torch.norm)
def norm(d, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if p == "nuc":
        raise NoRule("the nuclear norm has no rule")
    y = torch.norm(input, p, dim, keepdim, dtype=dtype)
    dx, x = _converted(dtype, d.input, input)
    return y, vector_norm_tangent(dx, x, 2 if p in ("fro", None) else p, dim, keepdim)


@rule(torch.linalg.norm, fresh=True)
def linalg_norm(d, A, ord=None, dim=None, keepdim=False, *, dtype=None):
    if ord is None or isinstance(dim, int) or (ord == "fro" and dim is not None):
        y = torch.linalg.norm(A, ord, dim, keepdim, dtype=dtype)
        dA, A = _converted(dtype, d.A, A)
        return y, vector_norm_tangent(dA, A, 2 if ord in (None, "fro") else ord, dim, keepdim)
    return fallback(torch.linalg.norm, (d.A,), (A, ord, dim, keepdim), {"dtype": dtype})


@rule(torch.logsumexp)
def logsumexp(d, input, dim, keepdim=False):
    y = torch.logsumexp(input, dim, keepdim)
    return y, softmax_weighted(d.input, input, y, dim, keepdim)


@rule(torch.prod)
def prod(d, input, dim=None, keepdim=False, *, dtype=None):
    y = torch.prod(input, dtype=dtype) if dim is None else torch.prod(input, dim, keepdim, dtype=dtype)
    return y, product_tangent(cast_tangent(d.input, y), cast_tangent(input, y), dim, keepdim)


@rule(torch.cumprod, fresh=True)
def cumprod(d, input, dim, *, dtype=None):
    y = torch.cumprod(input, dim, dtype=dtype)
    return y, cumulative_product_tangent(cast_tangent(d.input, y), cast_tangent(input, y), dim)


def _register_extremum(function):
    @rule(function, fresh=True)
    def extremum(d, input, dim=(), keepdim=False):
        y = function(input, dim, keepdim)
        return y, attained_tangent(d.input, input, y, dim, keepdim)


_register_extremum(torch.amax)
_register_extremum(torch.amin)


@rule(torch.aminmax, fresh=True)
def aminmax(d, input, *, dim=None, keepdim=False):
    results = torch.aminmax(input, dim=dim, keepdim=keepdim)
    low, high = (operator.getitem(results, i) for i in range(2))
    return results, tuple(attained_tangent(d.input, input, y, dim, keepdim) for y in (low, high))


def _pick(dx, indices, dim, keepdim):
    """The entries of a tangent that an operation along `dim` chose."""
    if keepdim:
        return torch.gather(dx, dim, indices)
    return torch.gather(dx, dim, torch.unsqueeze(indices, dim)).squeeze(dim)


def _register_choice(function, of_two):
    @rule(function, fresh=True)
    def choice(d, input, dim=None, keepdim=False):
        """max(x), max(x, dim) → (values, indices), max(x, other tensor)."""
        if dim is None:
            y = function(input)
            return y, attained_tangent(d.input, input, y, None, False)
        if not isinstance(dim, int):
            return apply_rule(of_two, (d.input, d.dim), (input, dim), {})
        results = function(input, dim, keepdim)
        return results, (_pick(d.input, operator.getitem(results, 1), dim, keepdim), ZERO)


_register_choice(torch.max, torch.maximum)
_register_choice(torch.min, torch.minimum)


def _register_selection(function, first):
    """function(x, *first, dim=-1, keepdim=False) → (values, indices), one entry chosen along dim."""

    @rule(function)
    def selection(d, input, *settings, **named):
        results = function(input, *settings, **named)
        values = dict(zip((*first, "dim", "keepdim"), settings, strict=False)) | named
        return results, (
            _pick(d.input, operator.getitem(results, 1), values.get("dim", -1), values.get("keepdim", False)),
            ZERO,
        )


_register_selection(torch.kthvalue, ("k",))
_register_selection(torch.mode, ())


@rule(torch.median)
def median(d, input, dim=None, keepdim=False):
    if dim is None:
        y = torch.median(input)
        return y, attained_tangent(d.input, input, y, None, False)
    results = torch.median(input, dim, keepdim)
    return results, (_pick(d.input, operator.getitem(results, 1), dim, keepdim), ZERO)


@rule(torch.topk)
def topk(d, input, k, dim=-1, largest=True, sorted=True):
    results = torch.topk(input, k, dim, largest, sorted)
    return results, (torch.gather(d.input, dim, operator.getitem(results, 1)), ZERO)


@rule(torch.sort)
def sort(d, input, dim=-1, descending=False, stable=False):
    results = torch.sort(input, dim=dim, descending=descending, stable=stable)
    return results, (torch.gather(d.input, dim, operator.getitem(results, 1)), ZERO)


@rule(torch.segment_reduce, fresh=True)
def segment_reduce(d, data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    if reduce == "prod":
        raise NoRule("the tangent of products of segments is not written")
    y = torch.segment_reduce(
        data, reduce, lengths=lengths, indices=indices, offsets=offsets, axis=axis, unsafe=unsafe, initial=initial
    )
    return y, segment_tangent(d.data, data, y, reduce, lengths, offsets, axis, unsafe)
