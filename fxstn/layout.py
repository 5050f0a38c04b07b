"""Where the examples of a batch are in each value of a canonical graph.

A perturbation per example multiplies row i of a layer's output by scales of its own, so it has to know which axis holds
the examples. Views that keep dimension 0 the batch need no analysis: the runtime checks its size, and row-major order does
the rest. What this file follows is what a size cannot tell: axes that move, and examples that are mixed or picked.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxstn.layers.noise import alpha_dropout_coefficients
from fxstn.mutation import DROPOUTS, is_size
from fxstn.rules import RULES

Tensor = torch.Tensor
NONE = "none"  # the value depends on no example: parameters, sizes
LOST = "lost"  # examples are mixed, picked, or somewhere unknown
Layout = int | str  # an axis, NONE or LOST

_SWAPS = {torch.transpose, torch.swapaxes}
_ALONG = {torch.cat: 1, torch.stack: 1, torch.chunk: 2, torch.split: 2, torch.tensor_split: 2, torch.unbind: 1,
          torch.narrow: 1, torch.select: 1, torch.flip: 1, torch.mean: 1, torch.sum: 1, torch.roll: 2,
          torch.cumsum: 1}  # fmt: skip
_TUPLES = {torch.chunk, torch.split, torch.tensor_split, torch.unbind, alpha_dropout_coefficients}
_DIM_NAMES = ("dim", "axis", "dims")
_DEFAULT_ALL = {torch.mean, torch.sum, torch.roll}


def _argument(node: fx.Node, position: int, names: tuple[str, ...], default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _getitem(node: fx.Node, axis: int) -> Layout:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and source.target in _TUPLES:
        return axis
    index = index if isinstance(index, tuple) else (index,)
    if axis != 0 or not index:
        return LOST if any(entry != slice(None) for entry in index) else axis
    first = index[0]
    if first is None:
        return axis + 1 if all(entry == slice(None) for entry in index[1:]) else LOST
    return axis if first is Ellipsis or first == slice(None) else LOST


def _moved(node: fx.Node, axis: int) -> Layout:
    """The axis after one operation that may move, join, pick or sum over it; LOST where it is no longer there."""
    target = node.target
    if target in _SWAPS:
        pair = _argument(node, 1, ("dim0", "axis0"), -1), _argument(node, 2, ("dim1", "axis1"), -1)
        return LOST if min(pair) < 0 else {pair[0]: pair[1], pair[1]: pair[0]}.get(axis, axis)
    if target is torch.permute:
        dims = _argument(node, 1, ("dims",), ())
        return list(dims).index(axis) if axis in dims else LOST
    if target in (torch.t, torch.movedim) or (target is getattr and node.args[1] in ("T", "mT")):
        return LOST
    if target is torch.unsqueeze:
        dim = _argument(node, 1, ("dim",), None)
        return LOST if not isinstance(dim, int) or dim < 0 else axis + (dim <= axis)
    if target is operator.getitem:
        return _getitem(node, axis)
    if target in _ALONG:
        dims = _argument(node, _ALONG[target], _DIM_NAMES, None if target in _DEFAULT_ALL else 0)
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        lowest = (
            -1 if target in (torch.mean, torch.sum, torch.cumsum) else 0
        )  # a negative dim may be any: no rank is known
        if None in dims or axis in dims or min(dims) < lowest:
            return LOST
        return axis - sum(0 <= dim < axis for dim in dims) if target in (torch.mean, torch.sum) else axis
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
            left = node.args[0]
            mixes = node.target in (operator.matmul, torch.mm, torch.bmm) and found.get(left, NONE) == NONE  # type: ignore[arg-type, call-overload]
            found[node] = LOST if mixes else _moved(node, sources[0])
    return found
