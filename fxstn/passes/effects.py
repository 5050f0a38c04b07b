"""What a node does besides computing its value: random draws, updates of buffers, memory that it shares with an argument."""

from __future__ import annotations

import operator
import types

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Target

from fxstn.ir.facts import is_fresh, is_functional, is_seeded, is_view, overloads, writes
from fxstn.ir.node_info import info_of
from fxstn.ir.staging import draws, staging_of
from fxstn.ir.vocabulary import DROPOUTS, dropout_settings, is_opaque, is_size
from fxstn.ops.inputs import REQUIREMENTS
from fxstn.ops.noise import track_batch, track_batches
from fxstn.ops.synced import BATCH_NORMS
from fxstn.rules import RULES


def is_random(function: Target) -> bool:
    """Whether an operation may draw random numbers: one of ours, one whose rule says so, or one that torch tags."""
    staging = staging_of(function)
    if staging and staging.derivative_of:
        return is_random(staging.derivative_of)
    return draws(function) or (function in RULES and RULES[function].random) or is_seeded(function)


def is_pure(node: fx.Node) -> bool:
    """Whether two nodes like this one always give the same value and leave everything else as it is.

    Only a declaration counts: torch's schema, a rule, or `staged` of a helper of ours. A user's function declares nothing.
    """
    if node.op != "call_function":
        return node.op in ("get_attr", "call_module")
    return not updates_statistics(node) and node.target is not track_batch and _is_declared_pure(node.target)


def _is_declared_pure(function: Target) -> bool:
    staging = staging_of(function)
    if staging and staging.derivative_of:  # the helper runs that operation, so it has the same effects
        return _is_declared_pure(staging.derivative_of)
    if is_opaque(function) or is_random(function):
        return False
    if function is getattr or staging:
        return True
    if getattr(function, "__module__", "") in ("_operator", "math"):
        return True
    return is_functional(function) if overloads(function) else function in RULES


def updates_statistics(node: fx.Node) -> bool:
    """Whether a norm updates running statistics: it normalises by its input and has statistics."""
    if node.target in BATCH_NORMS:
        names, default = ("x", "mean", "var", "weight", "bias", "training"), False
    elif node.target is F.instance_norm:
        names, default = ("x", "running_mean", "var", "weight", "bias", "use_input_stats"), True
    else:
        return False
    settings = dict(zip(names, node.args, strict=False)) | node.kwargs
    return settings.get(names[1]) is not None and bool(settings.get(names[5], default))


def may_write_parameters(graph: fx.Graph) -> bool:
    """Whether a graph calls something that may write into a parameter: a user's function, or an operation that says so."""
    return any(
        node.op == "call_function"
        and not (_is_ours(node.target) or updates_statistics(node) or _draws_or_is_pure(node))
        for node in graph.nodes
    )


def _is_ours(function: Target) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "fxstn"


def _draws_or_is_pure(node: fx.Node) -> bool:
    return is_pure(node) or (is_random(node.target) and not (is_opaque(node.target) or writes(node.target)))


def has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads its value.

    A random draw may go. A user's function stays: nobody knows what else it does.
    """
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    known = node.target in REQUIREMENTS or node.target is track_batches
    return known or updates_statistics(node) or is_opaque(node.target) or writes(node.target)


def shared_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of a call whose memory its result may share. Where nobody says so, all of them."""
    if node.op != "call_function" or is_size(node) or _is_fresh(node):
        return ()
    sources = tuple(source for source in node.all_input_nodes if not is_size(source))
    of_first = info_of(node).handed_through or node.target in DROPOUTS or node.target in (operator.getitem, getattr)
    method = isinstance(node.target, types.MethodDescriptorType)
    return sources[:1] if of_first or method or is_view(node.target) else sources


def _is_fresh(node: fx.Node) -> bool:
    """Whether the result of a call is in memory of its own."""
    if info_of(node).handed_through or is_opaque(node.target):
        return False
    if node.target in DROPOUTS:
        return dropout_settings(node)[1]
    if (
        node.target is torch.einsum and len(node.args) > 2
    ):  # of several operands: a product. Of one operand einsum may return a view.
        return True
    return is_fresh(node.target) or (node.target in RULES and RULES[node.target].fresh)
