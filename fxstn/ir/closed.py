"""Functions that torch.compile takes as one operator: loops over time, which it would unroll for each length anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass
class _Call:
    """What a call of the operator means, besides its tensors.

    constants: the leaves of the arguments, with `...` in place of tensors.
    device, autocast: what operations of the function see.
    results, present: structure of the results, and which of its leaves are tensors; known after the first run.
    """

    function: Callable[..., Any]
    constants: list[Any]
    arguments: TreeSpec
    device: str
    autocast: torch.dtype | None
    results: TreeSpec | None = None
    present: list[bool] = field(default_factory=list)

    @property
    def key(self) -> str:
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        return f"{name} {self.constants} {self.arguments} {self.device} {self.autocast}"

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors among the results."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is ... else leaf for leaf in self.constants]
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            results = self.function(*tree_unflatten(leaves, self.arguments))
        leaves, self.results = tree_flatten(results)
        self.present = [isinstance(leaf, Tensor) for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


_calls: dict[str, _Call] = {}


def closed_call(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), as one operator of the graph that torch.compile makes, and one of its backward graph.

    function: takes and returns structures of tensors, and None in place of some. It draws nothing and writes into nothing.
        Tensors of three dimensions and more have time in dimension 0, the same in all; no other size depends on it.

    The backward operator runs the function again.
    """
    leaves, arguments = tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    call = _Call(function, [... if isinstance(leaf, Tensor) else leaf for leaf in leaves], arguments, device, autocast)
    call = _calls.setdefault(call.key, call)
    results = iter(_closed(call.key, tensors))
    assert call.results is not None
    return tree_unflatten([next(results) if present else None for present in call.present], call.results)


def _apart(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous results, none of which shares memory with another or with an argument: what an operator may return."""
    memory, apart = {argument.untyped_storage()._cdata for argument in arguments}, []
    for result in results:
        own = result.contiguous()
        apart.append(own.clone() if own.untyped_storage()._cdata in memory else own)
        memory.add(apart[-1].untyped_storage()._cdata)
    return apart


@torch.library.custom_op("fxstn::closed", mutates_args=())
def _closed(key: str, tensors: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _apart(_calls[key](tensors), tensors)


@_closed.register_fake
def _(key: str, tensors: list[Tensor]) -> list[Tensor]:
    times = next((tensor.shape[0] for tensor in tensors if tensor.dim() > 2), 1)
    first = [tensor[:1] if tensor.dim() > 2 else tensor for tensor in tensors]
    with torch.no_grad():
        results = _calls[key](first)
    return [result.new_empty((times, *result.shape[1:]) if result.dim() > 2 else result.shape) for result in results]


@torch.library.custom_op("fxstn::closed_backward", mutates_args=())
def _backward(key: str, tensors: list[Tensor], gradients: list[Optional[Tensor]], sources: list[int]) -> list[Tensor]:  # noqa: UP045 (a schema is read from it)
    with torch.enable_grad(), torch._C._PreserveDispatchKeyGuard():
        for kind in ("AutogradFunctionality", "ADInplaceOrView"):  # operators run below autograd
            torch._C._dispatch_tls_set_dispatch_key_excluded(getattr(torch._C.DispatchKey, kind), False)
        leaves = [tensor.detach().requires_grad_(i in sources) for i, tensor in enumerate(tensors)]
        results = _calls[key](leaves)
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
    outputs, directions = [y for y, _ in pairs], [g for _, g in pairs]
    inputs = [leaves[i] for i in sources]
    changes = torch.autograd.grad(outputs, inputs, directions, allow_unused=True, materialize_grads=True)
    return _apart(changes, [*tensors, *directions])


@_backward.register_fake
def _(key: str, tensors: list[Tensor], gradients: list[Optional[Tensor]], sources: list[int]) -> list[Tensor]:  # noqa: UP045
    return [tensors[i].new_empty(tensors[i].shape) for i in sources]


def _save(ctx: Any, inputs: tuple[str, list[Tensor]], output: list[Tensor]) -> None:
    key, tensors = inputs
    ctx.key, ctx.sources = key, [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[None, list[Tensor | None]]:
    tensors = list(ctx.saved_tensors)
    result: list[Tensor | None] = [None] * len(tensors)
    for i, change in zip(ctx.sources, _backward(ctx.key, tensors, list(gradients), ctx.sources), strict=True):
        result[i] = change
    return None, result


_closed.register_autograd(_differentiate, setup_context=_save)
