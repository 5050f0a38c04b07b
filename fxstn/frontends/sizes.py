"""Inputs of other sizes than a graph holds for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxstn.ir.graphs import evaluated
from fxstn.ops.inputs import SIZE_REQUIREMENTS


def size_requirements(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that check sizes of inputs. Only graphs of torch.export have any."""
    return [node for target in SIZE_REQUIREMENTS for node in graph.find_nodes(op="call_function", target=target)]


def unmet_requirement(graph: fx.Graph, arguments: Mapping[str, Any]) -> str:
    """What a graph requires of the sizes of its inputs and these do not have; "" where it holds for them.

    arguments: the inputs by the names of the forward.
    """

    def value(node: fx.Node) -> Any:
        if node.op == "placeholder":
            name = str(node.target)
            return arguments.get(name.lstrip("*"), () if name.startswith("*") else next(iter(node.args), None))
        return evaluated(node, {source: value(source) for source in node.all_input_nodes})

    for node in size_requirements(graph):
        try:
            value(node)
        except ValueError as error:
            return str(error)
    return ""
