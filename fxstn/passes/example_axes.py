"""Where the examples of a batch are in each value of a canonical graph, found by trying.

A perturbation per example multiplies each example's share of a layer's output by scales of its own, so it has to know
where the examples are: along dimension 0 in a plain network, folded with windows in Swin, along dimension 1 in attention
or a time-major network, nowhere when the value mixes them. One forward of three examples, and two more in each of which
one example is another, show which entries belong to whom, for any operation and however it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fxstn.hp import OPERATIONS
from fxstn.ir.graphs import evaluated, forked_rng, placeholders, reseed
from fxstn.ir.node_info import info_of
from fxstn.ir.tangents import BatchAxis
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.ops.noise import track_batch
from fxstn.ops.synced import BATCH_NORMS

EXAMPLES = 3  # a prime: a size that is a multiple of it by accident is rare, and told by its pattern


def layouts(module: fx.GraphModule, inputs: tuple) -> dict[str, BatchAxis | None]:
    """The place of the examples in the value of each node, from one batch of inputs (any structure, batch first).

    Dropout is left out of the runs, and batch norm takes its statistics from the first, so that it joins no examples and
    keeps values in the range that activations are made for. Values that are no tensors are left out of the result; a value
    that does not depend on the examples is None.
    """
    batch = next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    try:
        return _layouts(module, inputs, batch, EXAMPLES)
    except Exception:  # whatever a model may raise: some are written for one batch size
        return _layouts(module, inputs, batch, max(2, batch))


def _layouts(module: fx.GraphModule, inputs: tuple, batch: int, examples: int) -> dict[str, BatchAxis | None]:
    own = [node for node in placeholders(module.graph) if node.name not in ("condition", "delta")]
    runs = [_bound(own, variant) for variant in _variants(inputs, batch, examples)]
    readers = {node: len(node.users) for node in module.graph.nodes}
    found: dict[str, BatchAxis | None] = {}
    device = next((leaf.device.type for leaf in tree_leaves(runs[0]) if isinstance(leaf, Tensor)), "cpu")
    with forked_rng(), torch.no_grad(), torch.autocast(device, enabled=False):
        for node in module.graph.nodes:
            if node.op == "output":
                break
            if node.target in BATCH_NORMS:
                for values, result in zip(runs, _normalised(module, node, runs), strict=True):
                    values[node] = result
            for values in runs:
                if node not in values:
                    reseed()  # random draws are the same in the three runs
                    values[node] = _value(module, node, values)
            base, *others = (values[node] for values in runs)
            if (
                isinstance(base, tuple) and base and isinstance(base[0], Tensor)
            ):  # as its first value, that of a recurrent layer
                base, *others = (values[node][0] for values in runs)
            if isinstance(base, Tensor) and node.op != "get_attr":
                found[node.name] = _place(base, others, examples)
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source]:
                    for values in runs:
                        del values[source]
    return found


def _variants(inputs: tuple, batch: int, examples: int) -> Iterator[tuple]:
    """A few examples of the inputs; the same with the first one another; the same with the last one another."""

    def first_few(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != batch:
            return leaf
        return leaf.detach()[torch.arange(examples) % batch]

    def with_another(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != examples or leaf.dtype == torch.bool:
            return leaf
        leaf = leaf.clone()
        if leaf.is_floating_point():
            leaf[index] += torch.randn_like(leaf[index]) * (leaf.std() + 0.1)
        else:  # other indices, each one that occurs
            values = leaf.unique()
            leaf[index] = values[(torch.searchsorted(values, leaf[index]) + 1) % len(values)]
        return leaf

    base = tree_map(first_few, inputs)
    with forked_rng():
        reseed()
        yield base
        for index in (0, examples - 1):
            yield tree_map(lambda leaf, i=index: with_another(leaf, i), base)


def _bound(nodes: list[fx.Node], inputs: tuple) -> dict[fx.Node, Any]:
    """Values of the placeholders: inputs by position, defaults for the rest."""
    values: dict[fx.Node, Any] = {}
    for i, node in enumerate(nodes):
        name = str(node.target)
        if name.startswith("**"):
            values[node] = {}
        elif name.startswith("*"):
            values[node] = tuple(inputs[i:])
        else:
            values[node] = inputs[i] if i < len(inputs) else node.args[0]
    return values


def _normalised(module: fx.GraphModule, node: fx.Node, runs: list[dict[fx.Node, Any]]) -> Iterator[Tensor]:
    """Batch norm of every run by the statistics of the first."""
    lookup: Any = runs[0].__getitem__
    arguments: Any = node.args
    x, _, _, weight, bias, _, _, eps = map_arg(arguments, lookup)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    for values in runs:
        yield F.batch_norm(values[arguments[0]], mean, var, weight, bias, False, 0.0, eps)


def _value(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
        return value if value.any() or not value.is_floating_point() else torch.randn_like(value)  # zeros hide examples
    if node.target is track_batch:
        return 0.0
    if node.target in DROPOUTS or node.target in OPERATIONS or info_of(node).handed_through:
        return values[node.args[0]]  # type: ignore[index]
    return evaluated(node, values)


def _place(base: Tensor, others: list[Tensor], examples: int) -> BatchAxis | None:
    """Where the entries that change with the first, and with the last example, are along one axis."""
    if any(other.shape != base.shape for other in others) or not base.dim():
        return None
    changed = [(other != base) & ~(other.isnan() & base.isnan()) for other in others]
    if not all(change.any() for change in changed):
        return None
    best: tuple[float, BatchAxis] | None = None
    for axis, size in enumerate(base.shape):
        if size % examples:
            continue
        first, last = (change.movedim(axis, 0).reshape(size, -1).any(1) for change in changed)
        position, folded = torch.arange(size, device=base.device), size // examples
        for right in (r for r in range(1, folded + 1) if folded % r == 0):
            example = (position // right) % examples
            if (first & (example != 0)).any() or (last & (example != examples - 1)).any():
                continue
            coverage = (first | last).sum().item() / (2 * folded)
            if best is None or coverage > best[0]:
                best = coverage, BatchAxis(axis, folded // right, right)
    return best[1] if best else None
