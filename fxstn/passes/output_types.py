"""The pass restore_types: the outputs of a graph have the types that the forward returns, an OrderedDict or a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxstn.frontends.interface import Plan
from fxstn.ir.graphs import copied
from fxstn.ir.node_info import info_of
from fxstn.ir.output_types import OutputTypes


def restore_types(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Leaves [y, …] → Output(y, …), where the forward returns an Output; ([y, …], [dy, …]) → (Output(…), Output(…)).

    The passes before this one see plain tuples, lists and dicts.
    """
    types = info_of(module.graph.output_node()).types
    if types is None:
        return module
    module = copied(module)
    output = module.graph.output_node()
    (value,) = output.args
    restored = _constructor(types)

    def restore(leaves: Any) -> fx.Node:
        with module.graph.inserting_before(output):
            return module.graph.call_function(restored, tuple(leaves))

    if plan.kind.objective == "pushforward" and isinstance(value, tuple):
        value = tuple(map(restore, value))
    elif plan.kind.auxiliary and plan.binding.auxiliary and isinstance(value, tuple):
        value = (restore(value[0]), value[1])
    else:
        value = restore(value)
    output.args = (value,)
    return module


def _constructor(types: OutputTypes) -> Callable[..., object]:
    """A function of the leaves that makes the output. The code of the graph shows it by the name of the outermost type."""

    def construct(*leaves: object) -> object:
        return types.restored(leaves)

    construct.__name__ = construct.__qualname__ = types.name
    return construct
