"""What symbolic tracing does not see: calls without a symbolic argument, whose results would be constants of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument, map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxstn.frontends.guards import UnsupportedError

_FACTORIES = {"tensor", "as_tensor", "arange", "linspace", "logspace", "zeros", "ones", "full", "eye", "empty", "tril_indices",
              "triu_indices", "rand", "randn", "randint", "randperm"}  # fmt: skip
_READS = {"item", "tolist", "__bool__", "__float__", "__int__", "equal", "allclose"}


class StrictMode(TorchFunctionMode):
    """Sees the calls that fx does not see, those without a symbolic argument. Their results would be constants of the graph.
    A factory or a random draw becomes a node, so that each forward makes the value anew, as the original does. A value that is
    computed from the model's own tensors is refused.

    place: returns the path of the module whose forward is running.
    """

    def __init__(self, model: nn.Module, tracer: fx.Tracer, place: Callable[[], str]) -> None:
        super().__init__()
        self.own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.tracer, self.place = tracer, place

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if next(proxies_in((args, kwargs)), None) is not None:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _FACTORIES:
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        result = function(*args, **kwargs)
        reads = any(isinstance(a, torch.Tensor) and id(a) in self.own for a in tree_leaves((args, kwargs)))
        if reads and (name in _READS or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))):
            what = f"{name} of a parameter or buffer that is not read as an attribute, which would be frozen,"
            raise UnsupportedError(self.place(), what, "read it as self.name in the forward")
        return result


def proxies_in(structure: Argument) -> Iterator[fx.Proxy]:
    """The proxies in the arguments or results of a call."""
    leaves: list[object] = []

    def collect(leaf: Argument) -> Argument:
        leaves.append(leaf)
        return leaf

    map_aggregate(structure, collect)
    return (leaf for leaf in leaves if isinstance(leaf, fx.Proxy))
