"""In-place operations expressed by values, for canonicalize; refused where memory may be shared."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxstn.ir.assignment import assigned
from fxstn.ir.errors import Diagnostic, module_path, operation_name, source_of
from fxstn.ir.node_info import copy_place
from fxstn.ir.vocabulary import is_size
from fxstn.passes.effects import shared_arguments


def _later_users(node: fx.Node, point: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user is not point and point < user]


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Every value that may share memory with `node`, itself excluded: what it may be a part of, and their other parts."""
    sources, pending = {node}, [node]
    while pending:
        further = [source for source in shared_arguments(pending.pop()) if source not in sources]
        sources.update(further)
        pending += further
    result, pending = set(sources), list(sources)
    while pending:
        value = pending.pop()
        further = [user for user in value.users if user not in result and value in shared_arguments(user)]
        result.update(further)
        pending += further
    return result - {node}


Parts = dict[fx.Node, tuple[fx.Node, Any]]  # values that are in the memory of another one, at an index


def functionalize(node: fx.Node, position: int, parts: Parts) -> Iterator[Diagnostic]:
    """Let later readers of the argument that `node` mutates read node's result; yields what stands against it.

    What is written into a part of a tensor, taken by an index, is written back into the tensor for its later readers.
    parts: of earlier mutations, where this one adds its own.
    """
    mutated, name = node.args[position], operation_name(node.target)
    if not isinstance(mutated, fx.Node):
        return
    # The part, what it is a part of, and so on, each with its index.
    chain: list[tuple[fx.Node, Any]] = [(mutated, None)]
    while (whole := parts.get(chain[-1][0]) or _whole(chain[-1][0])) is not None:
        chain.append(whole)
    written = [value for value, _ in chain]
    for alias in sorted({alias for value in written for alias in (value, *_aliases(value))}):
        if alias.op == "get_attr":
            what = f"{name} in place changes '{str(alias.target).removeprefix('model.')}', of the model itself,"
            yield Diagnostic(module_path(node), what, source_of(node), "update it outside of the forward")
        elif alias not in written and alias < node and any(not is_size(user) for user in _later_users(alias, node)):
            what = f"{name} in place on a tensor whose memory '{alias.name}' shares and reads later"
            yield Diagnostic(module_path(node), what, source_of(node), "write it without changing a tensor in place")
    read = max((i for i, value in enumerate(written) if _later_users(value, node)), default=0)
    result = node
    for i, (value, index) in enumerate(chain[: read + 1]):
        if i:
            part = result
            with node.graph.inserting_after(part):
                result = node.graph.call_function(assigned, (value, index, part))
            copy_place(result, node)
            parts[part] = (result, index)
        for user in _later_users(value, node):
            if user is not result:
                user.replace_input_with(value, result)


def _whole(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(tensor, index) where a value is tensor[index] in the same memory."""
    if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is torch.select and isinstance(node.args[1], int) and node.args[1] >= 0:
        return node.args[0], (*[slice(None)] * node.args[1], node.args[2])
    if node.target is operator.getitem and isinstance(node.args[1], tuple):  # an integer may index a tuple of results
        index = node.args[1]
        basic = all(isinstance(entry, (int, slice, type(None), type(...))) or is_size(entry) for entry in index)
        return (node.args[0], index) if basic else None
    return None
