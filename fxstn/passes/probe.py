"""Runs nodes of a graph several times with something changed, to see what moves with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fxstn.ir.generators import forked_rng, reseed

T = TypeVar("T")
Values = dict[fx.Node, Any]
# (node, values of this variant, values of the first variant) → value of the node. Both hold what the node reads.
Variant = Callable[[fx.Node, Values, Values], object]


def probe(
    nodes: Iterable[fx.Node], variants: Sequence[Variant], look: Callable[[fx.Node, list[object]], T]
) -> dict[fx.Node, T]:
    """Evaluates each node under every variant before the next node; random draws are the same in all variants.

    nodes: in the graph's order, with every node that they read.
    variants: the first one is what the others are compared with.
    look: gets a node and its values, one for each variant.

    Returns what `look` returns for each node. A value is forgotten after its last reader, so that few are held at a time.
    """
    nodes = list(nodes)
    inside = set(nodes)
    readers = {node: sum(user in inside for user in node.users) for node in nodes}
    runs: list[Values] = [{} for _ in variants]
    seen: dict[fx.Node, T] = {}
    with forked_rng(), torch.no_grad():
        for number, node in enumerate(nodes):
            for variant, values in zip(variants, runs, strict=True):
                reseed(number)
                values[node] = variant(node, values, runs[0])
            seen[node] = look(node, [values[node] for values in runs])
            for read in (*(source for source in node.all_input_nodes if source in inside), node):
                readers[read] -= read is not node
                if not readers[read]:
                    for values in runs:
                        values.pop(read, None)
    return seen


def changed(base: Tensor, other: Tensor) -> Tensor:
    """Where two values of one shape differ; a NaN equals a NaN. The result is dense."""
    base, other = (value if value.layout is torch.strided else value.to_dense() for value in (base, other))
    return (other != base) & ~(other.isnan() & base.isnan())
