"""Finds, in each live run, the operations that read λ.

An address names an operation: it is the same in every run of the same Python code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxstn.hp.binding import Binding
from fxstn.ir.node_info import info_of

Address = tuple[str, str, int]  # module path, operation, which call of it within one call of the module


@dataclass(frozen=True)
class Position:
    """λ[indices], for the result of an operation or of a module, or for one element of it."""

    indices: tuple[int, ...]
    element: int | None = None

    @property
    def index(self) -> int:
        """The one strength of a dropout."""
        (index,) = self.indices
        return index


@dataclass(frozen=True)
class RuntimeSites:
    """Which λ is read where, while a forward runs.

    arguments: {name: index into λ}, arguments of the forward that get a dropout.
    exits: {module path: positions}, results of modules that get a dropout.
    own: dropouts and random operations of the model, by address and by number of the module's call.
    insertions: results of operations that get a dropout, likewise.
    last: {module path: number of its last call that was recorded}.
    orders: {(module path, operation): the last of its calls within one call of the module that was recorded}.
    """

    arguments: dict[str, int] = field(default_factory=dict)
    exits: dict[str, list[Position]] = field(default_factory=dict)
    own: dict[Address, dict[int, Position]] = field(default_factory=dict)
    insertions: dict[Address, dict[int, Position]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    orders: dict[tuple[str, str], int] = field(default_factory=dict)

    def operations(self) -> set[str]:
        """Names of the operations at which λ is read."""
        return {operation for _, operation, _ in (*self.own, *self.insertions)}


@dataclass(frozen=True)
class Addresses:
    """Where the nodes of a recorded graph are in other runs.

    nodes: {name: address}, as `NodeInfo` has it, of the nodes that sites name.
    last, orders: as `RuntimeSites` has them, from 0.
    positions: {(node, number of a module call): which leaf of the call's output the node is}.
    """

    nodes: Mapping[str, tuple] = field(default_factory=dict)
    last: Mapping[str, int] = field(default_factory=dict)
    orders: Mapping[tuple[str, str], int] = field(default_factory=dict)
    positions: Mapping[tuple[str, int], int] = field(default_factory=dict)


def find_addresses(graph: fx.Graph, binding: Binding) -> Addresses:
    """The addresses that the sites of a binding need.

    graph: recorded, see `fxstn.frontends.live.record`.
    """
    names = {site.node for site in binding.sites}
    nodes = {node.name: address for node in graph.nodes if (address := info_of(node).address) is not None}
    last: dict[str, int] = {}
    orders: dict[tuple[str, str], int] = {}
    for kind, path, *rest in nodes.values():
        if kind == "operation":
            operation, order, occurrence, _ = rest
            last[path] = max(last.get(path, 0), occurrence)
            orders[path, operation] = max(orders.get((path, operation), 0), order)
    chosen = {name: nodes[name] for name in names}
    positions = {
        (node.name, number): leaf
        for node in graph.nodes
        if node.name in names
        for number, leaf in info_of(node).positions.items()
    }
    places = [(path, rest[0]) for kind, path, *rest in chosen.values() if kind == "operation"]
    return Addresses(
        chosen, {path: last[path] for path, _ in places}, {place: orders[place] for place in places}, positions
    )


def runtime_sites(binding: Binding, addresses: Addresses) -> RuntimeSites:
    """The sites of a binding where runs read them."""
    result = RuntimeSites()
    for site in binding.sites:
        kind, *address = addresses.nodes[site.node]
        if kind == "argument":
            result.arguments[address[0]] = site.index
        elif site.insert and (site.outside is not None or not site.path):
            leaf = None if site.outside is None else addresses.positions.get((site.node, site.outside))
            position = Position(site.indices, leaf)
            if position not in result.exits.setdefault(site.path, []):  # once for all calls
                result.exits[site.path].append(position)
        elif kind == "exit":
            result.exits.setdefault(address[0], []).append(Position(site.indices, address[1]))
        else:
            path, operation, order, occurrence, element = address
            group = result.insertions if site.insert else result.own
            group.setdefault((path, operation, order), {})[occurrence] = Position(site.indices, element)
            result.last[path] = addresses.last[path]
            result.orders[path, operation] = addresses.orders[path, operation]
    return result
