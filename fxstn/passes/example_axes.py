"""Where the examples of a batch are in each value of a canonical graph, found by trying.

A perturbation per example multiplies each example's share of a layer's output by scales of its own, so it has to know
where the examples are: along dimension 0 in a plain network, folded with windows in Swin, along dimension 1 in attention
or a time-major network, nowhere when the value mixes them. One forward of three examples, and two more in each of which
one example is another, show which entries belong to whom, for any operation and however it is written. A forward of five
examples shows which dimensions grow with the batch: so are rows found that are the same for all examples, such as a class
token's or those of a state that begins with zeros.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxstn.hp import OPERATIONS
from fxstn.ir.generators import forked_rng, reseed
from fxstn.ir.graphs import evaluated, filled_in, placeholders
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
    candidates = [i for i in tensors if len(leaves[i]) == batch and leaves[i].layout is torch.strided]
    sizes = {size for i in tensors for size in leaves[i].shape}
    unlike = [number for number in EXAMPLES if number not in sizes]
    few, more = (unlike + [number for number in EXAMPLES if number != batch])[:2]
    for rows in _by_likelihood(candidates):
        try:
            return _axes(module, _variants(leaves, structure, rows, few, more), few)
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


def _variants(
    leaves: list, structure: TreeSpec, rows: Sequence[int], few: int, more: int | None = None
) -> list[dict[str, Any]]:
    """A few examples of the inputs, and three copies: more examples; another first example; another last example.

    rows: positions of the leaves that hold examples.
    few, more: numbers of examples. Without `more` the copy of more examples is left out.
    """

    def with_examples(count: int, change: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Any]:
        examples = [
            change(leaf.detach()[torch.arange(count) % len(leaf)]) if i in rows else leaf
            for i, leaf in enumerate(leaves)
        ]
        return tree_unflatten(examples, structure)

    with forked_rng():
        reseed()
        others = [with_examples(few, partial(_with_another, i)) for i in (0, few - 1)]
        return [with_examples(few), *([] if more is None else [with_examples(more)]), *others]


def _with_another(index: int, leaf: Tensor, axis: int = 0) -> Tensor:
    """The same examples, one of them another. A mask stays: another one may leave nothing to compute with.

    axis: of the examples.
    """
    if leaf.dtype == torch.bool:
        return leaf
    leaf = leaf.movedim(axis, 0).clone()
    if leaf.is_floating_point():
        leaf[index] += torch.randn_like(leaf[index]) * (leaf.std() + 0.1)
    else:  # indices change to others that occur, because those are in the range of the table
        values = leaf.unique()
        leaf[index] = values[(torch.searchsorted(values, leaf[index]) + 1) % len(values)]
    return leaf.movedim(0, axis)


class _Search:
    """Where the examples are in the values that have been computed so far.

    few: number of examples.
    grows: whether the second run has more of them. A value is SHARED, or has equal rows, only where that is known.
    """

    def __init__(self, module: fx.GraphModule, few: int, grows: bool) -> None:
        self.module, self.few, self.grows = module, few, grows
        self.axes: dict[str, BatchAxis | None] = {}
        self.longer: dict[fx.Node, list[int]] = {}  # dimensions that are longer with more examples
        self.unmoved: set[fx.Node] = set()  # nodes that read only the type, the device or the sizes of examples

    def variant(self, inputs: Values, run: int) -> Variant:
        """The run of that number. Rows that are the same for all examples get another first, or last, one as the inputs do.

        inputs: values of the placeholders.
        """
        example = {1 + self.grows: 0, 2 + self.grows: self.few - 1}.get(run)

        def value(node: fx.Node, values: Values, base: Values) -> object:
            result = inputs[node] if node in inputs else _value(self.module, node, values, base)
            tensor, first = _first_of(result), _first_of(base.get(node))
            if not isinstance(tensor, Tensor) or not isinstance(first, Tensor) or not self.grows:
                return result
            if run == 1:
                self.longer[node] = _longer(first, tensor)
            elif example is not None and tensor is result and self._has_equal_rows(node, tensor, first):
                return _with_another(example, tensor, self.longer[node][0])
            elif example == self.few - 1 and not self.longer[node] and self._reads_no_entry(node, values, tensor):
                self.unmoved.add(node)
            return result

        return value

    def _reads_no_entry(self, node: fx.Node, values: Values, result: Tensor) -> bool:
        """Whether a value stays as it is, whatever the entries of the examples are that its operation reads."""
        read = [source for source in node.all_input_nodes if self.axes.get(source.name, SHARED) != SHARED]
        if not read or any(not isinstance(values[source], Tensor) for source in read):
            return False
        for change in (_moved, lambda value: _moved(value.flip(0))):
            try:
                other = _first_of(_value(self.module, node, values | {n: change(values[n]) for n in read}, values))
            except SIZE_ERRORS:  # no index any more
                return False
            if not isinstance(other, Tensor) or other.shape != result.shape or changed(result, other).any():
                return False
        return True

    def _has_equal_rows(self, node: fx.Node, value: Tensor, base: Tensor) -> bool:
        """Whether a value has a row for each example, none of which depends on it. Indices are looked at where they begin."""
        rows = [value.shape[axis] for axis in self.longer.get(node, [])] == [self.few]
        begins = value.is_floating_point() or self._depends_on_none(node)
        return rows and begins and value.shape == base.shape and not changed(base, value).any()

    def _depends_on_none(self, node: fx.Node) -> bool:
        return node in self.unmoved or all(
            self.axes.get(source.name, SHARED) == SHARED for source in node.all_input_nodes
        )

    def look(self, node: fx.Node, values: list[object]) -> None:
        """Enter the place of the examples in a value. values: of each run."""
        tensors = [value for value in map(_first_of, values) if isinstance(value, Tensor)]
        if len(tensors) == len(values) and node.op != "get_attr":
            self.axes[node.name] = self._place(node, tensors[0], tensors[1 + self.grows :])

    def _place(self, node: fx.Node, base: Tensor, others: Sequence[Tensor]) -> BatchAxis | None:
        if base.layout is not torch.strided or any(other.shape != base.shape for other in others):
            return None
        if any(changed(base, other).any() for other in others):
            where = self.longer[node] if self.grows else range(base.dim())
            return _axis_of(base, others, where, self.few)
        if not self.grows:  # a batch of equal rows has a row for each; the examples of a mask stay as they are
            alone = self.few not in base.shape and (node.op, base.dtype) != ("placeholder", torch.bool)
            return SHARED if alone and self._depends_on_none(node) else None
        if not self.longer[node]:
            return SHARED if self._depends_on_none(node) else None
        return _axis_of_equal_rows(base, self.longer[node], self.few)


def _axes(module: fx.GraphModule, variants: Sequence[dict[str, Any]], few: int) -> dict[str, BatchAxis | None]:
    """variants: as `_variants` makes them."""
    own = [node for node in placeholders(module.graph) if node.target not in ("condition", "delta")]
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    search = _Search(module, few, grows=len(variants) > 3)
    runs = [search.variant(_bind_inputs(own, inputs), run) for run, inputs in enumerate(variants)]
    device = next((leaf.device.type for leaf in tree_flatten(variants)[0] if isinstance(leaf, Tensor)), "cpu")
    types = {weight.dtype for weight in module.parameters() if weight.is_floating_point()}
    mixed = len(types) > 1 and torch.is_autocast_enabled(device)  # a frozen float16 part, say, may run in no other way
    with torch.autocast(device, enabled=mixed):
        probe(nodes, runs, search.look)
    return search.axes


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


def _value(module: fx.GraphModule, node: fx.Node, values: Values, base: Values) -> object:
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
        zeros = value.layout is torch.strided and not value.any()  # which would hide examples
        return torch.randn_like(value) if zeros and value.is_floating_point() else value
    if node.target is track_batch:
        return 0.0
    if node.target in SIZE_REQUIREMENTS:  # a few examples are no batch
        return None
    if node.target in BATCH_NORMS:
        return _norm_by_base(node, values, base)
    if node.target in DROPOUTS or node.target in OPERATIONS or info_of(node).handed_through:
        return filled_in(node.args[0], values)
    return evaluated(node, values)


def _moved(value: Tensor) -> Tensor:
    """A value of which every entry is another."""
    step = 1 + torch.rand_like(value) if value.is_floating_point() else 1
    return ~value if value.dtype == torch.bool else value + step


def _first_of(value: object) -> object:
    """The first of several results, which stands for all of them; a value that is one result as it is."""
    return value[0] if isinstance(value, tuple) and value else value


def _longer(base: Tensor, more: Tensor) -> list[int]:
    """Dimensions of a value that are longer with more examples."""
    pairs = zip(base.shape, more.shape, strict=False)
    return [axis for axis, (n, m) in enumerate(pairs) if n != m]


def _axis_of(base: Tensor, others: Sequence[Tensor], axes: Iterable[int], examples: int) -> BatchAxis | None:
    """Where the entries that change with the first, and with the last example, are along one of some axes."""
    changes = [changed(base, other) for other in others]
    if not all(change.any() for change in changes):
        return None
    best: tuple[float, BatchAxis] | None = None
    for axis in axes:
        size = base.shape[axis]
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


def _axis_of_equal_rows(value: Tensor, axes: Sequence[int], examples: int) -> BatchAxis | None:
    """Where the examples are in a value that is the same for all: along the one axis that is longer with more of them.

    Rows of an example that lie between those of others are told from them where they differ from each other.
    """
    if len(axes) > 1 or value.shape[axes[0]] % examples:
        return None
    folded = value.shape[axes[0]] // examples
    places = []
    for right in (r for r in range(1, folded + 1) if folded % r == 0):
        rows = value.movedim(axes[0], 0).unflatten(0, (folded // right, examples, right))
        if not changed(rows, rows[:, :1].expand_as(rows)).any():
            places.append(BatchAxis(axes[0], folded // right, right))
    return places[0] if len(places) == 1 else None
