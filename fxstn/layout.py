"""Where the examples of a batch are in each value of a canonical graph.

A perturbation per example multiplies row i of a layer's output by scales of its own, so it has to know which axis holds
the examples. Views that keep dimension 0 the batch need no analysis: the runtime checks its size, and row-major order does
the rest. What this file follows is what a size cannot tell: axes that move, and examples that are mixed or picked.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx

from fxstn.layers.noise import alpha_dropout_coefficients
from fxstn.mutation import DROPOUTS, is_size
from fxstn.rules import RULES

Tensor = torch.Tensor
NONE = "none"  # the value depends on no example: parameters, sizes
LOST = "lost"  # examples are mixed, picked, or somewhere unknown
Layout = int | str  # an axis, NONE or LOST

_SWAPS = {torch.transpose, torch.swapaxes}
# Position of the dimension that an operation works along, and what it is where it is not given.
_ALONG = {torch.cat: 1, torch.stack: 1, torch.chunk: 2, torch.split: 2, torch.tensor_split: 2, torch.unbind: 1,
          torch.narrow: 1, torch.select: 1, torch.flip: 1, torch.roll: 2, torch.cumsum: 1, torch.gather: 1,
          torch.index_select: 1, torch.take_along_dim: 2, torch.scatter: 1, torch.scatter_add: 1, torch.index_add: 1,
          torch.index_copy: 1, torch.index_fill: 1, torch.slice_scatter: 2, torch.select_scatter: 2, torch.sort: 1,
          torch.argsort: 1, torch.topk: 2, torch.repeat_interleave: 2}  # fmt: skip
_REDUCTIONS = {torch.mean: 1, torch.sum: 1, torch.var: 1, torch.std: 1, torch.var_mean: 1, torch.std_mean: 1,
               torch.norm: 2, torch.linalg.norm: 2, torch.linalg.vector_norm: 2, torch.logsumexp: 1, torch.prod: 1,
               torch.amax: 1, torch.amin: 1, torch.max: 1, torch.min: 1, torch.median: 1, torch.kthvalue: 2,
               torch.mode: 1, torch.argmax: 1, torch.argmin: 1, torch.any: 1, torch.all: 1, torch.count_nonzero: 1,
               F.cosine_similarity: 2}  # fmt: skip
_ALONG.update(_REDUCTIONS)
_LAST = {torch.sort, torch.argsort, torch.topk, torch.kthvalue, torch.mode}  # without a dimension: the last
_FIRST = {torch.cat, torch.stack, torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.slice_scatter}
_MAYBE_LAST = {
    torch.cumsum,
    *_LAST,
    *_REDUCTIONS,
}  # a dim of -1 is not the examples': a value of rank 1 has no features
_TUPLES = {torch.chunk, torch.split, torch.tensor_split, torch.unbind, alpha_dropout_coefficients, torch.var_mean,
           torch.std_mean, torch.max, torch.min, torch.median, torch.kthvalue, torch.mode, torch.sort,
           torch.topk}  # fmt: skip
_MIXING = {torch.t, torch.movedim, torch.adjoint, torch.rot90, torch.flipud, torch.fliplr, torch.atleast_2d,
           torch.atleast_3d, torch.vstack, torch.dstack, torch.hsplit, torch.vsplit, torch.dsplit, torch.block_diag,
           torch.broadcast_tensors, torch.meshgrid, torch.masked_select, torch.take, torch.masked_scatter,
           torch.index_put, torch.diag, torch.diagonal, torch.diagonal_scatter, torch.trace, torch.tensordot,
           torch.outer, torch.kron, torch.inner, torch.dot, torch.vdot, torch.addr, torch.addbmm, torch.cdist,
           torch.nonzero, torch.argwhere, torch.searchsorted, torchvision.ops.nms,
           torch.ops.torchvision.nms, torch.unique, torch.unique_consecutive, torch.fft.fftn, torch.fft.ifftn,
           torch.fft.rfftn, torch.fft.irfftn, torch.fft.fftshift, torch.fft.ifftshift, torch.linalg.vecdot}  # fmt: skip
_PRODUCTS = {operator.matmul: 0, torch.mm: 0, torch.bmm: 0, torch.mv: 0, torch.addmm: 1, torch.addmv: 1,
             torch.baddbmm: 1}  # fmt: skip
_DIM_NAMES = ("dim", "axis", "dims")


def _argument(node: fx.Node, position: int, names: tuple[str, ...], default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _getitem(node: fx.Node, axis: int) -> Layout:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and source.target in _TUPLES:
        return axis
    index = index if isinstance(index, tuple) else (index,)
    dim, moved = 0, axis
    for entry in index:
        if entry is None:
            moved += dim <= axis
            continue
        if entry is Ellipsis:
            return moved if axis == 0 or dim > axis else LOST  # what follows counts from the end: no rank is known
        if (dim == axis and entry != slice(None)) or (dim < axis and not isinstance(entry, (int, slice))):
            return LOST
        moved -= dim < axis and isinstance(entry, int)
        dim += 1
    picked = [i for i, entry in enumerate(index) if entry is not None and not isinstance(entry, slice)]
    apart = bool(picked) and picked[-1] - picked[0] >= len(picked)
    if apart and not all(isinstance(index[i], int) for i in picked):
        return LOST  # torch puts the dimensions of indices that stand apart in front
    return moved


def _einsum(node: fx.Node, axis: int, found: dict[fx.Node, Layout]) -> Layout:
    """The output position of the letter that stands for the examples in every operand that has them."""
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return LOST
    terms, output = equation.replace(" ", "").split("->")
    pairs = zip(terms.split(","), operands, strict=True)
    letters = {term[axis] for term, x in pairs if isinstance(x, fx.Node) and found.get(x, NONE) != NONE}
    letter = letters.pop()
    return LOST if letters or letter not in output else output.index(letter)


def _moved(node: fx.Node, axis: int, found: dict[fx.Node, Layout]) -> Layout:
    """The axis after one operation that may move, join, pick or sum over it; LOST where it is no longer there."""
    target = node.target
    if target in _SWAPS:
        pair = _argument(node, 1, ("dim0", "axis0"), -1), _argument(node, 2, ("dim1", "axis1"), -1)
        return LOST if min(pair) < 0 else {pair[0]: pair[1], pair[1]: pair[0]}.get(axis, axis)
    if target is torch.permute:
        dims = _argument(node, 1, ("dims",), ())
        return list(dims).index(axis) if axis in dims else LOST
    if target in _MIXING or (target in RULES and RULES[target].kind in ("loss", "region")):  # type: ignore[index]
        return LOST
    if target is torch.where and len(node.args) == 1:
        return LOST
    if target is getattr and node.args[1] in ("T", "mT", "H", "mH"):
        return LOST
    if target is torch.einsum:
        return _einsum(node, axis, found)
    if target is torch.diag_embed and len(node.args) + len(node.kwargs) > 1:
        return LOST
    if target is torch.unsqueeze:
        dim = _argument(node, 1, ("dim",), None)
        return LOST if not isinstance(dim, int) or dim < 0 else axis + (dim <= axis)
    if target is operator.getitem:
        return _getitem(node, axis)
    if target in _ALONG:
        default = 0 if target in _FIRST else -1 if target in _LAST else 1 if target is F.cosine_similarity else None
        dims = _argument(node, _ALONG[target], _DIM_NAMES, default)
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        lowest = -1 if target in _MAYBE_LAST else 0  # any other negative dim may be any: no rank is known
        if not all(isinstance(dim, int) and dim >= lowest and dim != axis for dim in dims) or not dims:
            return LOST
        before = sum(0 <= dim < axis for dim in dims)
        if target is torch.stack:
            return axis + before
        dropped = target in (torch.select, torch.unbind)
        if target in _REDUCTIONS:
            dropped = not _argument(node, _ALONG[target] + 1, ("keepdim",), False)
        return axis - before if dropped else axis
    if target in (Tensor.repeat, torch.tile):
        sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        return axis if axis == 0 and sizes[0] == 1 else LOST
    return axis


def layouts(graph: fx.Graph) -> dict[fx.Node, Layout]:
    """Each node's example axis: 0 in a plain network, another after a transpose, NONE, or LOST."""
    found: dict[fx.Node, Layout] = {}
    for node in graph.nodes:
        sources = [found[source] for source in node.all_input_nodes if found.get(source, NONE) != NONE]
        if node.op == "placeholder":
            found[node] = NONE if node.name in ("condition", "delta") else 0
        elif not sources or node.op != "call_function" or is_size(node):
            found[node] = NONE
        elif len(set(sources)) > 1 or LOST in sources or not (node.target in RULES or node.target in DROPOUTS):
            found[node] = LOST
        else:
            assert isinstance(sources[0], int)
            left = node.args[_PRODUCTS.get(node.target, 0)]  # type: ignore[arg-type]
            mixes = node.target in _PRODUCTS and found.get(left, NONE) == NONE  # type: ignore[arg-type, call-overload]
            found[node] = LOST if mixes else _moved(node, sources[0], found)
    return found
