"""Random operations in a program of torch.export: one node each, which becomes the operation again in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxstn.frontends.guards import UnsupportedError
from fxstn.hp import OPERATIONS


class RandomCall(NamedTuple):
    """A call of a random operation: function(x, *strengths, **settings)."""

    function: Callable[..., object]
    strengths: tuple
    settings: Mapping[str, object]


@torch.library.custom_op("fxstn::random_operation", mutates_args=())
def random_operation(x: Tensor, number: int) -> Tensor:
    """What a program holds in place of a random operation on x: its number among the calls. It is never run."""
    return x.clone()


@random_operation.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


class OperationMarker(TorchFunctionMode):
    """Inside, `random_operation` stands for each call of a random operation.

    parameters: of the model.

    calls: these calls, by number.

    Raises UnsupportedError for an assignment of .data, which export does not see, and for a parameter that the model does not
    have, which export takes for a constant.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.calls: list[RandomCall] = []
        self._own = {id(parameter) for parameter in parameters}

    def __torch_function__(
        self, function: Callable[..., object], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function == getattr(Tensor.data, "__set__"):  # noqa: B009
            what = "the forward assigns .data of a tensor, which a traced graph would lose,"
            raise UnsupportedError("", what, "compute another tensor in its place")
        for value in tree_leaves((args, kwargs)):  # the model's own are fake here, of another type
            if type(value) is nn.Parameter and value.requires_grad and id(value) not in self._own:
                what = f"a parameter of shape {tuple(value.shape)} that no module of the model holds, and that would not train,"
                raise UnsupportedError("", what, "keep it, or its module, as an attribute of a module of the model")
        if function not in OPERATIONS:
            return function(*args, **(kwargs or {}))
        self.calls.append(RandomCall(function, args[1:], kwargs or {}))
        return random_operation(args[0], len(self.calls) - 1)
