"""In-place operations expressed by values, for canonicalize; refused where memory may be shared."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxstn.ir.assignment import assigned, overwritten
from fxstn.ir.errors import Diagnostic, module_path, operation_name, source_of
from fxstn.ir.node_info import copy_place, info_of
from fxstn.ir.vocabulary import DROPOUTS, dropout_settings, is_size
from fxstn.ops.noise import track_batch
from fxstn.ops.synced import BATCH_NORMS
from fxstn.rules import RULES

# Results in memory of their own, beside what ATen's schemas say. Anything else may share its input's: better a refusal
# than a mutation overlooked.
FRESH = {F.pad, *BATCH_NORMS, F.normalize, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.max_pool1d, F.max_pool2d,
         F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, F.interpolate, F.layer_norm,
         F.group_norm, operator.neg, operator.truediv, operator.pow, assigned, overwritten, track_batch}  # fmt: skip
# Operations that may return their input, or views of it, though their schemas do not say so.
UNDECLARED = {"einsum", "type_as", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "atleast_1d",
              "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "tensordot"}  # fmt: skip
FRESH_KINDS = {"pointwise", "additive", "bilinear", "layer"}


@functools.cache
def is_fresh(function: Any) -> bool:
    """Whether the result of an operation never is (a view of) one of its arguments: by our list, or ATen's schemas."""
    name = getattr(function, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and name not in UNDECLARED else None
    if function in FRESH or packet is None:
        return function in FRESH
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads() if "out" not in overload]
    return all(result.alias_info is None for schema in schemas for result in schema.returns)


def may_share_memory(node: fx.Node) -> bool:
    """Whether the result of an operation may be (a view of) its first argument."""
    if node.op != "call_function" or is_size(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if info_of(node).handed_through:
        return True
    if node.target in DROPOUTS:
        return not dropout_settings(node)[1]
    kind = RULES[node.target].kind if node.target in RULES else None
    return not (is_fresh(node.target) or kind in FRESH_KINDS)


def _later_users(node: fx.Node, point: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user is not point and point < user]


def _aliases(node: fx.Node) -> Iterator[fx.Node]:
    """Every value that may share memory with `node`, itself excluded."""
    base = node
    while may_share_memory(base):
        base = base.args[0]  # type: ignore[assignment]
    pending, seen = [base], {node}
    while pending:
        value = pending.pop()
        if value not in seen:
            seen.add(value)
            yield value
        pending += [user for user in value.users if may_share_memory(user) and user.args[0] is value]


Parts = dict[fx.Node, tuple[fx.Node, Any]]  # values that are in the memory of another one, at an index


def functionalize(node: fx.Node, position: int, parts: Parts) -> Iterator[Diagnostic]:
    """Let later readers of the argument that `node` mutates read node's result; yields what stands against it.

    What is written into a part of a tensor, taken by an index, is written back into the tensor for its later readers.
    parts: of earlier mutations, where this one adds its own.
    """
    mutated, name = node.args[position], operation_name(node.target)
    if not isinstance(mutated, fx.Node):
        return
    chain: list[tuple[fx.Node, Any]] = [
        (mutated, None)
    ]  # the part, what it is a part of, and so on, each with its index
    while (whole := parts.get(chain[-1][0]) or _whole(chain[-1][0])) is not None:
        chain.append(whole)
    written = [value for value, _ in chain]
    for alias in dict.fromkeys(alias for value in written for alias in (value, *_aliases(value))):
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
