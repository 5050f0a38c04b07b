"""What passes know about a node of a graph, besides what fx says: one frozen record, in place of loose keys of `meta`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import fx

from fxstn.ir.output_types import OutputTypes

_KEY = "fxstn"
_STACK = "stack_trace"


class ModuleCall(NamedTuple):
    """One call of a module during a forward: its number in order, the module's path, its type."""

    number: int
    path: str
    kind: type


class RowScales(NamedTuple):
    """The scales of one part of a value's tangent.

    name: of the node that computes them.
    axis: of the value, along which they are.
    runs: of their entries (start, stop), one after the other; () for all.
    rank: of the value, 0 where it is several tensors in one.
    origins: (name of an operand, number of a part of its tangent) of all that this part is computed from; () for the parameter.
    """

    name: str
    axis: int
    runs: tuple[tuple[int, int], ...]
    rank: int
    origins: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class NodeInfo:
    """Facts about one node. Copies of a node share the record; `annotate` replaces it.

    scope: the module calls that the node belongs to, outermost first. By the frontend, as the next five.
    exits: the module calls whose output it is, innermost first.
    full_precision: types of device whose autocast the forward has switched off there; None stands for that of the operands.
    training: of a module that stays one node, whether it was in train mode.
    handed_through: the node only keeps a module's output apart from its input.
    address, positions: of a live recording; see `fxstn.frontends.live.record`.
    types: of the output node, the `OutputTypes` of what the forward returns where that is no plain tuple, list or dict.
    mutates: position of the argument that it writes into; gone after canonicalize.
    response: of a parameter, the name of the node that holds its response R. By hyperize, as the next one.
    scales: of a parameter that responds, and of every value computed from such parameters that keeps some axis of them.
    rule, operation: of a node that a tangent goes through, the kind of its rule and its name. By pushforward.
    """

    scope: tuple[ModuleCall, ...] = ()
    exits: tuple[ModuleCall, ...] = ()
    full_precision: tuple[str | None, ...] = ()
    training: bool | None = None
    handed_through: bool = False
    address: tuple[Any, ...] | None = None
    positions: Mapping[int, int] = field(default_factory=dict)
    types: OutputTypes | None = None
    mutates: int | None = None
    response: str | None = None
    scales: tuple[RowScales, ...] = ()
    rule: str | None = None
    operation: str | None = None

    @property
    def path(self) -> str:
        """Path of the innermost module whose forward made this node; "" for the model itself."""
        return self.scope[-1].path if self.scope else ""


_NOTHING = NodeInfo()


def info_of(node: fx.Node) -> NodeInfo:
    return node.meta.get(_KEY, _NOTHING)


def annotate(node: fx.Node, **facts: Any) -> None:
    """Replace some facts about a node; the record that its copies share stays as it is."""
    node.meta[_KEY] = replace(info_of(node), **facts)


def copy_place(node: fx.Node, source: fx.Node) -> None:
    """Let a new node stand where `source` does: in the same module call and precision, at the same line. All else is
    forgotten."""
    node.meta = {_STACK: source.meta[_STACK]} if _STACK in source.meta else {}
    annotate(node, scope=info_of(source).scope, full_precision=info_of(source).full_precision)


def copy_facts(node: fx.Node, source: fx.Node) -> None:
    """Let a new node stand for `source`, with all that is known about it."""
    node.meta = dict(source.meta)
