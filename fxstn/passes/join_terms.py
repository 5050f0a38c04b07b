"""The pass join_terms: sums of a product and other terms become one operation each, which passes over memory less often."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, fx

from fxstn.frontends.interface import DEFAULT_PLAN, Plan
from fxstn.ir.graphs import copied
from fxstn.ir.node_info import info_of
from fxstn.ir.staging import draws
from fxstn.ops.norms import layer_norm_jacobian
from fxstn.ops.scaled import scaled_tangent
from fxstn.ops.sums import add_product, scaled_layer_norm, scaled_product
from fxstn.passes.effects import has_effect
from fxstn.passes.lower_weights import is_lowered


def join_terms(module: fx.GraphModule, plan: Plan = DEFAULT_PLAN) -> fx.GraphModule:
    """W dx + s ⊙ y + b, the same of a layer norm's Jacobian, and x + y ⊙ noise, where nobody else reads the product."""
    module = copied(module)
    for node, function, args in list(joinable_terms(module.graph)):
        node.target, node.args = function, args
    for node in module.graph.find_nodes(op="call_function", target=scaled_layer_norm):
        if all(_multiplies(user, node) for user in node.users):
            node.update_kwarg("lowered", True)
    module.graph.eliminate_dead_code(has_effect)
    module.graph.lint()
    return module


def joinable_terms(graph: fx.Graph) -> Iterator[tuple[fx.Node, Callable[..., Tensor], tuple]]:
    """(sum, the operation for all of it, its arguments) of each such sum."""
    for node in graph.find_nodes(op="call_function", target=scaled_tangent):
        product = node.args[0]
        if not _is_read_here_alone(product, node):
            continue
        if product.target is F.linear and not any(product.args[2:]) and not product.kwargs:
            yield node, scaled_product, (*product.args[:2], *node.args[1:])
        elif product.target is layer_norm_jacobian and product.args[2] is not None:
            yield node, scaled_layer_norm, (*product.args, *node.args[1:])
    for node in graph.find_nodes(op="call_function", target=operator.add):
        for product, rest in (node.args, node.args[::-1]):
            if _is_read_here_alone(product, node) and product.target is operator.mul and isinstance(rest, fx.Node):
                value, factor = product.args
                if isinstance(value, fx.Node) and isinstance(factor, fx.Node) and draws(factor.target):
                    yield node, add_product, (rest, value, factor)
                    break


def _is_read_here_alone(value: object, reader: fx.Node) -> bool:
    """Whether a value is computed for one reader alone, in the same precision."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or len(value.users) != 1:
        return False
    return info_of(value).full_precision == info_of(reader).full_precision


def _multiplies(user: fx.Node, value: fx.Node) -> bool:
    """Whether a node is a product of the value and a weight that autocast lowers, and reads it as nothing else."""
    return (
        (is_lowered(user) or (user.target is scaled_product and not info_of(user).full_precision))
        and user.args[0] is value
        and value not in user.args[1:]
    )
