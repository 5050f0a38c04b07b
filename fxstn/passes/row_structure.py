"""Which values computed from parameters alone keep their row structure: slices, joins, normalised or standardised weights.

A response scales a parameter along one axis. An operation that treats those rows apart, g(W)[r] = g_r(W[r]), passes such a
tangent on: g'(W)[s ⊙ R] = s ⊙ g'(W)[R]. Whether it does is found by trying: change some rows and see what changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from fxstn.ir.graphs import evaluated, filled_in, model_of
from fxstn.ir.staging import draws
from fxstn.ir.vocabulary import is_size
from fxstn.passes.probe import Values, Variant, changed, probe

MOST_RUNS = 64


@dataclass(frozen=True)
class Rows:
    """Position p along `axis` of a value depends on one row of its parameters: `runs` of rows (start, stop), joined.

    parameters: names, those of one structure, which share their scales; the first gives its name to them.
    """

    parameters: tuple[str, ...]
    axis: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Derived:
    """A value computed from parameters alone.

    parameters: their names.
    rows: the structure of the value; None where rows are mixed, or where the value is a tuple.
    """

    parameters: tuple[str, ...]
    rows: Rows | None


def structures(module: fx.GraphModule, names: Iterable[str], axis: int) -> dict[fx.Node, Derived]:
    """Every node of a canonical graph that depends on some of these parameters, and on no input.

    names: of the parameters, which are scaled along `axis`. Those that have no such axis count as mixed.
    """
    parameters = {f"model.{name}": name for name in names}
    ancestors = from_parameters(module.graph, parameters)
    sizes = {name: _rows_of(model_of(module).get_parameter(name), axis) for name in parameters.values()}
    moves = _probe(module, ancestors, parameters, axis, max(sizes.values(), default=0))
    result: dict[fx.Node, Derived] = {}
    for node, names in ancestors.items():
        count = {sizes[name] for name in names}
        runs: tuple[int, Runs] | None = None
        if node.op == "get_attr" and 0 not in count:
            runs = axis, ((0, sizes[names[0]]),)
        elif (node_moves := moves.get(node)) and len(count) == 1 and 0 not in count:
            runs = _decode(node_moves, count.pop(), axis)
        result[node] = Derived(names, Rows(names, *runs) if runs else None)
    return result


def _rows_of(parameter: Tensor, axis: int) -> int:
    return parameter.shape[axis] if parameter.dim() > axis else 0


def from_parameters(graph: fx.Graph, parameters: Mapping[str, str]) -> dict[fx.Node, tuple[str, ...]]:
    """{node: names of the parameters it depends on}, for nodes that depend on parameters, buffers and constants only.

    parameters: {target of a get_attr node: name}.
    """
    constant: set[fx.Node] = set()  # random draws of a parameter's shape included
    result: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target in parameters:
                result[node] = (parameters[str(node.target)],)
            else:
                constant.add(node)
        elif node.op == "call_function" and draws(node.target) and node.args[0] in result:
            constant.add(node)
        elif node.op == "call_function" and all(s in result or s in constant for s in node.all_input_nodes):
            names = dict.fromkeys(name for source in node.all_input_nodes for name in result.get(source, ()))
            if names and not is_size(node):
                result[node] = tuple(names)
            else:
                constant.add(node)
    return result


Runs = tuple[tuple[int, int], ...]
Moves = list[tuple[Tensor, Tensor]]


def _probe(
    module: fx.GraphModule, derived: Container[fx.Node], parameters: Mapping[str, str], axis: int, rows: int
) -> dict[fx.Node, Moves | None]:
    """{node: for every bit of a row's number, where the value moves with the rows that have it set, and clear}.

    None for what is no tensor, and for nodes that are only read on the way.
    """
    targets = [node for node in module.graph.nodes if node in derived and node.op != "get_attr"]
    if not targets:
        return {}

    def look(node: fx.Node, values: list[object]) -> Moves | None:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if node.op == "get_attr" or node not in derived or not tensors:
            return None
        moves = [changed(tensors[0], other) for other in tensors[1:]]
        return list(zip(moves[::2], moves[1::2], strict=True))

    bits = max(1, (rows - 1).bit_length())
    changes: list[Callable[[Tensor], Tensor]] = [Tensor.detach]
    changes += [partial(_with_rows_moved, axis, bit, on) for bit in range(bits) for on in (1, 0)]
    variants = [_variant(module, parameters, change) for change in changes]
    needed = _closure(targets)
    return probe([node for node in module.graph.nodes if node in needed], variants, look)


def _variant(module: fx.GraphModule, parameters: Container[str], change: Callable[[Tensor], Tensor]) -> Variant:
    def value(node: fx.Node, values: Values, _: Values) -> object:
        if node.op == "get_attr":
            attribute = operator.attrgetter(str(node.target))(module).detach().clone()  # later nodes may write into it
            return change(attribute) if node.target in parameters else attribute
        if draws(node.target):
            return torch.ones_like(filled_in(node.args[0], values))
        return evaluated(node, values)

    return value


def _with_rows_moved(axis: int, bit: int, on: int, value: Tensor) -> Tensor:
    """A parameter with the rows moved whose number has one bit set (`on` 1) or clear (0)."""
    if value.dim() <= axis:
        return value
    numbers = torch.arange(value.shape[axis], device=value.device)
    chosen = ((numbers >> bit) & 1) == on
    noise = torch.empty_like(value).uniform_(0.5, 1.5) * (value.abs().mean() + 0.1)
    return value + noise * chosen.view([-1 if i == axis else 1 for i in range(value.dim())])


def _closure(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they read."""
    needed: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            shaped = draws(node.target)  # a draw needs only the shape, that of its first argument
            pending += node.all_input_nodes[:1] if shaped else node.all_input_nodes
    return needed


def _decode(moves: Moves, rows: int, preferred: int) -> tuple[int, Runs] | None:
    """(axis, runs) such that each position along the axis moves with one row only; None where there is no such axis."""
    rank = moves[0][0].dim()
    for axis in sorted(range(rank), key=lambda candidate: candidate != preferred):
        sets, clears = (  # each (bits, positions)
            torch.stack([move[i].movedim(axis, 0).reshape(move[i].shape[axis], -1).any(1) for move in moves])
            for i in (0, 1)
        )
        if (sets & clears).any():
            continue
        depends = (sets | clears).any(0).tolist()
        numbers = (sets.long() << torch.arange(len(moves), device=sets.device)[:, None]).sum(0).tolist()
        runs = _runs(numbers, depends, rows)
        if runs is not None:
            return axis, runs
    return None


def _runs(numbers: list[int], depends: list[bool], rows: int) -> Runs | None:
    """Consecutive row numbers joined; a position that depends on no row goes on where the last one was."""
    runs: list[tuple[int, int]] = []
    for number, known in zip(numbers, depends, strict=True):
        number = number if known else (runs[-1][1] % rows if runs else 0)
        if number >= rows:
            return None
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return tuple(runs) if len(runs) <= MOST_RUNS else None


def consumers(node: fx.Node, derived: Container[fx.Node]) -> Iterator[fx.Node]:
    """The operations that read a derived value and are not derived themselves, sizes aside."""
    yield from (user for user in node.users if user not in derived and not is_size(user))
