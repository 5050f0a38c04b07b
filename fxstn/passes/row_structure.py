"""Which values computed from parameters alone keep their row structure: slices, joins, normalised or standardised weights.

A response scales a parameter along one axis. An operation that treats those rows apart, g(W)[r] = g_r(W[r]), passes such a
tangent on: g'(W)[s ⊙ R] = s ⊙ g'(W)[R]. Whether it does is found by trying: change some rows and see what changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxstn.ir.graphs import evaluated, forked_rng, model_of, reseed
from fxstn.ir.staging import draws
from fxstn.ir.vocabulary import is_size

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
    """A node computed from parameters alone, their names, and its structure, None where rows are mixed or it is a tuple."""

    parameters: tuple[str, ...]
    rows: Rows | None


def structures(module: fx.GraphModule, names: Iterable[str], axis: int) -> dict[fx.Node, Derived]:
    """Every node of a canonical graph that depends on the parameters `names`, scaled along `axis`, and on no input.

    Parameters that have no such axis count as mixed.
    """
    parameters = {f"model.{name}": name for name in names}
    ancestors = from_parameters(module.graph, parameters)
    tried = [node for node in ancestors if node.op != "get_attr"]
    sizes = {name: _rows_of(model_of(module).get_parameter(name), axis) for name in parameters.values()}
    found = {node: Derived(names, None) for node, names in ancestors.items()}
    for node, names in ancestors.items():
        count = {sizes[name] for name in names}
        if node.op == "get_attr":
            rows = Rows(names, axis, ((0, sizes[names[0]]),)) if 0 not in count else None
            found[node] = Derived(names, rows)
    if tried:
        for node, changes in _probe(module, ancestors, parameters, axis, max(sizes.values())).items():
            names = ancestors[node]
            count = {sizes[name] for name in names}
            runs = _decode(changes, count.pop(), axis) if len(count) == 1 and 0 not in count else None
            found[node] = Derived(names, Rows(names, *runs) if runs else None)
    return found


def _rows_of(parameter: Tensor, axis: int) -> int:
    return parameter.shape[axis] if parameter.dim() > axis else 0


def from_parameters(graph: fx.Graph, parameters: Mapping[str, str]) -> dict[fx.Node, tuple[str, ...]]:
    """{node: names of the parameters it depends on}, for nodes that depend on parameters, buffers and constants only.

    parameters: {target of a get_attr node: name}.
    """
    constant: set[fx.Node] = set()  # random draws of a parameter's shape included
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target in parameters:
                found[node] = (parameters[str(node.target)],)
            else:
                constant.add(node)
        elif node.op == "call_function" and draws(node.target) and node.args[0] in found:
            constant.add(node)
        elif node.op == "call_function" and all(s in found or s in constant for s in node.all_input_nodes):
            names = dict.fromkeys(name for source in node.all_input_nodes for name in found.get(source, ()))
            if names and not is_size(node):
                found[node] = tuple(names)
            else:
                constant.add(node)
    return found


Change = Callable[[Tensor, str], Tensor]


def _probe(
    module: fx.GraphModule, nodes: Mapping[fx.Node, Any], parameters: Mapping[str, str], axis: int, rows: int
) -> dict[fx.Node, list[tuple[Tensor, Tensor]]]:
    """{node: for every bit of a row's number, where the value changes with the rows that have it set, and clear}."""
    needed = _closure(node for node in nodes if node.op != "get_attr")

    def run(changed: Callable[[Tensor], Tensor]) -> dict[fx.Node, Any]:
        reseed()  # a random draw is the same in every run
        values: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(module).detach().clone()  # later nodes may write into it
                values[node] = changed(value) if node.target in parameters else value
            elif draws(node.target):
                values[node] = torch.ones_like(values[node.args[0]])
            else:
                values[node] = evaluated(node, values)
        derived = (node for node in values if node in nodes and node.op != "get_attr")
        return {node: values[node] for node in derived if isinstance(values[node], Tensor)}

    def moved(bit: int, on: int) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            if value.dim() <= axis:
                return value
            numbers = torch.arange(value.shape[axis], device=value.device)
            chosen = ((numbers >> bit) & 1) == on
            noise = torch.empty_like(value).uniform_(0.5, 1.5) * (value.abs().mean() + 0.1)
            return value + noise * chosen.view([-1 if i == axis else 1 for i in range(value.dim())])

        return change

    with forked_rng(), torch.no_grad():
        base = run(lambda value: value)
        bits = max(1, (rows - 1).bit_length())
        changes: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {node: [] for node in base}
        for bit in range(bits):
            both = [run(moved(bit, on)) for on in (1, 0)]
            for node, found in changes.items():
                found.append(tuple(values[node] != base[node] for values in both))  # type: ignore[arg-type]
    return changes


def _closure(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they read."""
    needed: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            shaped = draws(node.target)  # by its first argument, and nothing else is needed of it
            pending += node.all_input_nodes[:1] if shaped else node.all_input_nodes
    return needed


def _decode(
    changes: list[tuple[Tensor, Tensor]], rows: int, preferred: int
) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """(axis, runs) such that each position along the axis moves with one row only, None where there is no such axis."""
    rank = changes[0][0].dim()
    for axis in sorted(range(rank), key=lambda candidate: candidate != preferred):
        sets, clears = (
            torch.stack([c[i].movedim(axis, 0).reshape(c[i].shape[axis], -1).any(1) for c in changes]) for i in (0, 1)
        )  # (bits, positions)
        if (sets & clears).any():
            continue
        depends = (sets | clears).any(0).tolist()
        numbers = (sets.long() << torch.arange(len(changes), device=sets.device)[:, None]).sum(0).tolist()
        runs = _runs(numbers, depends, rows)
        if runs is not None:
            return axis, runs
    return None


def _runs(numbers: list[int], depends: list[bool], rows: int) -> tuple[tuple[int, int], ...] | None:
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


def consumers(node: fx.Node, found: Container[fx.Node]) -> Iterator[fx.Node]:
    """The operations that read a derived value and are not derived themselves, sizes aside."""
    yield from (user for user in node.users if user not in found and not is_size(user))
