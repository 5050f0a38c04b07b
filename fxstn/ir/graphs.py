"""Small graph operations that the passes share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from typing import Any, cast

from torch import fx, nn
from torch.fx.node import Argument, map_aggregate

from fxstn.ir.errors import Diagnostic, TransformError
from fxstn.ir.node_info import copy_facts


class Draft(fx.GraphModule):
    """A graph between two passes: it is read and edited, never run, so that no code is generated for it."""

    def recompile(self) -> Any:
        return None


def assemble(
    root: nn.Module, graph: fx.Graph, name: str = "Draft", kind: type[fx.GraphModule] = Draft
) -> fx.GraphModule:
    """Module over `graph` whose children are the very children of `root`: moving or loading one moves both.

    kind: Draft between passes, fx.GraphModule for what is to be run.
    """
    module = kind(nn.Module(), fx.Graph(), class_name=name)
    for child_name, child in root.named_children():
        module.add_module(child_name, child)
    if kind is fx.GraphModule:
        graph.on_generate_code(lambda _: partial(_with_each_owner_once, graph))
    module.graph = graph
    return module


def _with_each_owner_once(graph: fx.Graph, code: list[str]) -> list[str]:
    """The code of a graph, where a module is looked up once for all of its parameters and buffers.

    torch looks up `model`, the module and the parameter for each of these, by a function of Python's each time.

    code: pieces, one of which is `name = expression` for a node.
    """
    owners = {node.name: str(node.target).rpartition(".")[0] for node in graph.find_nodes(op="get_attr")}
    repeated = {owner for owner, times in Counter(owners.values()).items() if owner and times > 1}
    names = {owner: f"owner_{number}" for number, owner in enumerate(sorted(repeated))}
    if not names or any(node.name in names.values() for node in graph.nodes):
        return code
    result: list[str] = []
    known: set[str] = set()
    for piece in code:
        match = _READ.fullmatch(piece)
        owner = owners.get(match["name"], "") if match else ""
        if match and owner in names:
            if owner not in known:
                result.append(f"{names[owner]} = {match['owner']}\n")
            known.add(owner)
            piece = f"{match['left']} = {names[owner]}.{match['attribute']}"
        result.append(piece)
    return result


_READ = re.compile(r"(?P<left>(?P<name>\w+)( : [^=]+)?) = (?P<owner>(self|getattr)\b.*)\.(?P<attribute>\w+)")


def model_of(module: fx.GraphModule) -> nn.Module:
    """The original network that a graph reads its parameters from."""
    return module.get_submodule("model")


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph a pass may edit; names and meta are kept, parameters shared."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    copy_facts(graph.output(result), output_of(module.graph))
    return assemble(module, graph)


def map_leaves(structure: object, change: Callable[[Any], object]) -> Any:
    """A structure of arguments with change(leaf) in place of each leaf, of whatever type; fx's own keeps to its types."""
    return map_aggregate(cast(Argument, structure), cast(Callable[[Argument], Argument], change))


def filled_in(structure: object, values: Mapping[fx.Node, Any]) -> Any:
    """A structure of arguments, with values in place of the nodes in it."""
    return map_leaves(structure, lambda leaf: values[leaf] if isinstance(leaf, fx.Node) else leaf)


def function_of(node: fx.Node) -> Callable[..., Any]:
    """What a call_function node calls."""
    if not callable(node.target):
        raise TypeError(f"{node.format_node()} calls no function")
    return node.target


def evaluated(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a call_function node computes from the values of other nodes."""
    return function_of(node)(*filled_in(node.args, values), **filled_in(node.kwargs, values))


def output_of(graph: fx.Graph) -> fx.Node:
    """The node that returns the graph's output."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def own_inputs(graph: fx.Graph) -> list[str]:
    """Targets of the placeholders for inputs of the model: all but `condition` and `delta`."""
    first = takewhile(lambda node: node.op == "placeholder", graph.nodes)
    return [str(node.target) for node in first if node.target not in ("condition", "delta")]


def complete_defaults(graph: fx.Graph) -> None:
    """Give inputs without a default that come after inputs with one the default None, as the syntax of Python asks."""
    has_default = False
    for node in placeholders(graph):
        has_default = has_default or bool(node.args)
        if has_default and not node.args and not str(node.target).startswith("*"):
            node.args = (None,)


def add_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new last input with default None (before **kwargs, where the model takes any)."""
    existing = placeholders(graph)
    if any(str(node.target).lstrip("*") == name for node in existing):
        what = f"the forward has an input named {name!r}, which the graphs need themselves,"
        raise TransformError([Diagnostic("", what, "", "rename that input")])
    keyword = [node for node in existing if str(node.target).startswith("**")]
    anchor = keyword[0] if keyword else next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(anchor):
        return graph.create_node("placeholder", name, (None,), name=name)


def rename(node: fx.Node, name: str) -> None:
    if node.name != name:
        node._rename(name)
