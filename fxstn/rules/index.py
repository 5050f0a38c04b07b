"""Picking, masking and placing entries. Indices and masks have no tangent; what is placed may have one."""

from __future__ import annotations

import torch

from fxstn.ops.kernels import expand_like
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import filled, linear, rule, total

linear(torch.gather, torch.index_select, torch.masked_select, torch.take)
linear(torch.take_along_dim, torch.diag, torch.repeat_interleave, fresh=True)
linear(torch.tril, torch.triu, torch.diagonal, torch.diag_embed)


@rule(torch.masked_fill)
def masked_fill(d, input, mask, value):
    y = torch.masked_fill(input, mask, value)
    return y, total(
        (d.input, lambda dx: expand_like(torch.masked_fill(dx, mask, 0), y)),
        (d.value, lambda dv: torch.where(mask, expand_like(dv, y), 0)),
    )


def _placed(operation, d_input, input, d_values, values):
    """(y, dy) of operation(input, values), linear in both jointly: the operation on both tangents."""
    return operation(input, values), operation(filled(d_input, input), filled(d_values, values))


@rule(torch.masked_scatter)
def masked_scatter(d, input, mask, source):
    return _placed(lambda x, v: torch.masked_scatter(x, mask, v), d.input, input, d.source, source)


@rule(torch.scatter)
def scatter(d, input, dim, index, src=None, *, value=None, reduce=None):
    if reduce is not None:
        raise NoRule("scatter with a reduction has no rule")
    src = value if src is None else src
    return _placed(lambda x, v: torch.scatter(x, dim, index, v), d.input, input, d.src, src)


@rule(torch.scatter_add)
def scatter_add(d, input, dim, index, src):
    return _placed(lambda x, v: torch.scatter_add(x, dim, index, v), d.input, input, d.src, src)


@rule(torch.index_add)
def index_add(d, input, dim, index, source, *, alpha=1):
    return _placed(lambda x, v: torch.index_add(x, dim, index, v, alpha=alpha), d.input, input, d.source, source)


@rule(torch.index_copy)
def index_copy(d, input, dim, index, source):
    return _placed(lambda x, v: torch.index_copy(x, dim, index, v), d.input, input, d.source, source)


@rule(torch.index_fill)
def index_fill(d, input, dim, index, value):
    return _placed(lambda x, v: torch.index_fill(x, dim, index, v), d.input, input, d.value, value)


@rule(torch.index_put)
def index_put(d, input, indices, values, accumulate=False):
    return _placed(lambda x, v: torch.index_put(x, indices, v, accumulate), d.input, input, d.values, values)


@rule(torch.slice_scatter)
def slice_scatter(d, input, src, dim=0, start=None, end=None, step=1):
    return _placed(lambda x, v: torch.slice_scatter(x, v, dim, start, end, step), d.input, input, d.src, src)


@rule(torch.select_scatter)
def select_scatter(d, input, src, dim, index):
    return _placed(lambda x, v: torch.select_scatter(x, v, dim, index), d.input, input, d.src, src)


@rule(torch.diagonal_scatter)
def diagonal_scatter(d, input, src, offset=0, dim1=0, dim2=1):
    return _placed(lambda x, v: torch.diagonal_scatter(x, v, offset, dim1, dim2), d.input, input, d.src, src)
