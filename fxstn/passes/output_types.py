"""Pass restore_types: the outputs of a graph have the types that the forward returns, an OrderedDict or a model's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from fxstn.frontends.interface import Plan
from fxstn.ir.graphs import copied
from fxstn.ir.node_info import info_of


def restore_types(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Plain outputs {…} → Output({…}), where the forward returns an Output; (y, dy) → (Output(y), Output(dy)).

    The passes before this one see plain tuples, lists and dicts.
    """
    structure = info_of(module.graph.output_node()).structure
    if structure is None:
        return module
    module = copied(module)
    output = module.graph.output_node()
    (value,) = output.args
    restored = _constructor(structure)

    def restore(plain: fx.node.Argument) -> fx.Node:
        with module.graph.inserting_before(output):
            return module.graph.call_function(restored, tuple(tree_leaves(plain)))

    if plan.kind.objective == "pushforward" and isinstance(value, tuple):
        value = tuple(map(restore, value))
    elif plan.kind.auxiliary and plan.binding.auxiliary and isinstance(value, tuple):
        value = (restore(value[0]), value[1])
    else:
        value = restore(value)
    output.args = (value,)
    return module


def _constructor(structure: TreeSpec) -> Callable[..., object]:
    """A function of the leaves that makes the structure. The code of the graph shows it by the name of the outermost type."""

    def construct(*leaves: object) -> object:
        return tree_unflatten(list(leaves), structure)

    construct.__name__ = construct.__qualname__ = str(structure.type.__name__ if structure.type else "output")
    return construct
