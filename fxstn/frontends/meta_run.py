"""A run of a graph without values: whether its operations fit together, in sizes and in types."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.frontends.preservation import Preservation


def runs_on_meta(graph: fx.GraphModule, *inputs: object, **named: object) -> bool:
    """Whether a graph surely runs on inputs like these: it does so on torch's meta device, where tensors have no values.

    False says nothing: an operation may need values, may be unknown to the meta device, or may fail. Neither does a run with
    several floating point types count, because the meta device does not check all of their combinations.
    """
    registered = [
        *graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False),
    ]  # fmt: skip
    tensors = [leaf for leaf in (*tree_leaves((inputs, named)), *dict(registered).values()) if isinstance(leaf, Tensor)]
    types = {x.dtype.to_real() for x in tensors if x.is_floating_point() or x.is_complex()}
    if len(types) > 1:
        return False
    known: dict[int, Tensor] = {}

    def without_values(x: Tensor) -> Tensor:
        return known.setdefault(id(x), x.detach().to("meta"))

    try:
        stand_ins = {name: without_values(x) for name, x in registered}
        args, kwargs = tree_map_only(Tensor, without_values, (inputs, named))
        # A tensor of several names is swapped several times, and gets back last what was swapped first.
        others = Preservation(graph, None, but=dict(registered).values())
        with others, _reparametrize_module(graph, stand_ins, stack_weights=True), torch.no_grad():
            graph.forward(*args, **kwargs)
    except Exception:  # whatever the device raises: then values decide
        return False
    return True
