"""Where the examples of a batch are in each value of a canonical graph, found by trying.

A perturbation per example multiplies each example's share of a layer's output by scales of its own, so it has to know
where the examples are: along dimension 0 in a plain network, folded with windows in Swin, along dimension 1 in attention
or a time-major network, nowhere when the value mixes them. One forward of three examples, and two more in each of which
one example is another, show which entries belong to whom, for any operation and however it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxstn.hp import OPERATIONS
from fxstn.ir.graphs import evaluated, filled_in, forked_rng, placeholders, reseed
from fxstn.ir.node_info import info_of
from fxstn.ir.tangents import SHARED, BatchAxes, BatchAxis
from fxstn.ir.vocabulary import DROPOUTS
from fxstn.ops.inputs import SIZE_REQUIREMENTS
from fxstn.ops.noise import track_batch
from fxstn.ops.synced import BATCH_NORMS
from fxstn.passes.probe import Values, Variant, changed, probe

EXAMPLES = (3, 5, 7, 11, 13)  # primes, because few sizes of a model are multiples of them
MOST_TRIALS = 32
# Operations, and assertions in models, raise these where a size does not fit.
SIZE_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AssertionError)


def find_batch_axes(module: fx.GraphModule, inputs: dict[str, Any]) -> BatchAxes:
    """The place of the examples in the value of each node.

    inputs: one batch by the names of the forward, each of any structure. Dimension 0 of the first tensor is the batch.

    Dropout is left out of the runs, and batch norm takes its statistics from the first, so that it joins no examples and
    keeps values in the range that activations are made for. Values that are no tensors are left out of the result; a value
    that depends on no example, and has no row for each, is SHARED.
    """
    leaves, structure = tree_flatten(inputs)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = len(leaves[tensors[0]])
    candidates = [i for i in tensors if len(leaves[i]) == batch]
    sizes = {size for i in tensors for size in leaves[i].shape}
    few = next((number for number in EXAMPLES if number not in sizes), EXAMPLES[batch == EXAMPLES[0]])
    for rows in _by_likelihood(candidates):
        try:
            return _axes(module, _variants(leaves, structure, rows, few), few)
        except SIZE_ERRORS:
            continue
    few = max(2, batch)  # some models are written for one batch size
    try:
        return _axes(module, _variants(leaves, structure, candidates, few), few)
    except SIZE_ERRORS:
        if batch > 1:
            raise
        return dict.fromkeys((node.name for node in module.graph.nodes), None)  # a graph for one example alone


def _by_likelihood(candidates: Sequence[int]) -> Iterator[list[int]]:
    """Which inputs may be batches, of those that are as long as one; the first is.

    A mask of (L, L) entries is as long as a batch of L examples. With fewer examples the model then fails, unless the mask
    keeps its size.
    """
    first, *others = candidates
    trials = (set(subset) for size in range(len(others), -1, -1) for subset in combinations(others, size))
    for _, subset in zip(range(MOST_TRIALS), trials, strict=False):
        yield [first, *(i for i in others if i in subset)]


def _variants(leaves: list, structure: TreeSpec, rows: Sequence[int], few: int) -> list[dict[str, Any]]:
    """A few examples of the inputs, and two copies: one with another first example, one with another last example.

    rows: positions of the leaves that hold examples.
    few: number of examples.
    """

    def with_examples(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return tree_unflatten([change(leaf) if i in rows else leaf for i, leaf in enumerate(leaves)], structure)

    leaves = [leaf.detach()[torch.arange(few) % len(leaf)] if i in rows else leaf for i, leaf in enumerate(leaves)]
    with forked_rng():
        reseed()
        return [with_examples(lambda leaf: leaf), *(with_examples(partial(_with_another, i)) for i in (0, few - 1))]


def _with_another(index: int, leaf: Tensor) -> Tensor:
    """The same examples, one of them another. A mask stays: another one may leave nothing to compute with."""
    if leaf.dtype == torch.bool:
        return leaf
    leaf = leaf.clone()
    if leaf.is_floating_point():
        leaf[index] += torch.randn_like(leaf[index]) * (leaf.std() + 0.1)
    else:  # indices change to others that occur, because those are in the range of the table
        values = leaf.unique()
        leaf[index] = values[(torch.searchsorted(values, leaf[index]) + 1) % len(values)]
    return leaf


def _axes(module: fx.GraphModule, variants: Sequence[dict[str, Any]], few: int) -> dict[str, BatchAxis | None]:
    own = [node for node in placeholders(module.graph) if node.name not in ("condition", "delta")]
    axes: dict[str, BatchAxis | None] = {}

    def look(node: fx.Node, values: list[object]) -> None:
        # The first of several results stands for all of them.
        results = [value[0] if isinstance(value, tuple) and value else value for value in values]
        tensors = [value for value in results if isinstance(value, Tensor)]
        if tensors and node.op != "get_attr":
            shared = _is_shared(node, tensors, axes, few)
            axes[node.name] = SHARED if shared else _axis_of(tensors[0], tensors[1:], few)

    nodes = [node for node in module.graph.nodes if node.op != "output"]
    device = next((leaf.device.type for leaf in tree_flatten(variants)[0] if isinstance(leaf, Tensor)), "cpu")
    with torch.autocast(device, enabled=False):
        probe(nodes, [_variant(module, _bind_inputs(own, inputs)) for inputs in variants], look)
    return axes


def _variant(module: fx.GraphModule, inputs: Values) -> Variant:
    def value(node: fx.Node, values: Values, base: Values) -> object:
        if node in inputs:
            return inputs[node]
        if node.target in BATCH_NORMS:
            return _norm_by_base(node, values, base)
        return _value(module, node, values)

    return value


def _bind_inputs(nodes: list[fx.Node], inputs: dict[str, Any]) -> Values:
    """Values of the placeholders: inputs by name, defaults for the rest."""
    values: Values = {}
    for node in nodes:
        name = str(node.target)
        default = () if name.startswith("*") else next(iter(node.args), None)
        values[node] = inputs.get(name.lstrip("*"), default)
    return values


def _norm_by_base(node: fx.Node, values: Values, base: Values) -> Tensor:
    """Batch norm by the statistics of the first run."""
    x, _, _, weight, bias, _, _, eps = filled_in(node.args, base)
    var, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return F.batch_norm(filled_in(node.args[0], values), mean, var, weight, bias, False, 0.0, eps)


def _value(module: fx.GraphModule, node: fx.Node, values: Values) -> object:
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
        return value if value.any() or not value.is_floating_point() else torch.randn_like(value)  # zeros hide examples
    if node.target is track_batch:
        return 0.0
    if node.target in SIZE_REQUIREMENTS:  # a few examples are no batch
        return None
    if node.target in DROPOUTS or node.target in OPERATIONS or info_of(node).handed_through:
        return filled_in(node.args[0], values)
    return evaluated(node, values)


def _is_shared(node: fx.Node, values: Sequence[Tensor], axes: BatchAxes, examples: int) -> bool:
    """Whether a value, and all that it is computed from, depends on no example. A batch of equal rows has a row for each."""
    base, *others = values
    if examples in base.shape or any(x.shape != base.shape or changed(base, x).any() for x in others):
        return False
    if node.op == "placeholder":
        return base.dtype != torch.bool  # the examples of a mask stay as they are
    return all(axes.get(source.name, SHARED) == SHARED for source in node.all_input_nodes)


def _axis_of(base: Tensor, others: Sequence[Tensor], examples: int) -> BatchAxis | None:
    """Where the entries that change with the first, and with the last example, are along one axis."""
    if any(other.shape != base.shape for other in others) or not base.dim():
        return None
    changes = [changed(base, other) for other in others]
    if not all(change.any() for change in changes):
        return None
    best: tuple[float, BatchAxis] | None = None
    for axis, size in enumerate(base.shape):
        if size % examples:
            continue
        first, last = (change.movedim(axis, 0).reshape(size, -1).any(1) for change in changes)
        position, folded = torch.arange(size, device=base.device), size // examples
        for right in (r for r in range(1, folded + 1) if folded % r == 0):
            example = (position // right) % examples
            if (first & (example != 0)).any() or (last & (example != examples - 1)).any():
                continue
            coverage = (first | last).sum().item() / (2 * folded)
            if best is None or coverage > best[0]:
                best = coverage, BatchAxis(axis, folded // right, right)
    return best[1] if best else None
