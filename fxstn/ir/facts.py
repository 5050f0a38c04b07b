"""What torch says about its own operations: their schemas, the memory of their results, whether they draw random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload, OpOverloadPacket

from fxstn.ir.spelling import origin_of

Function = Callable[..., object] | str
TRUSTED = ("aten", "prims", "torchvision")  # namespaces whose schemas say all that an operation does


@functools.cache
def overloads(function: Function) -> tuple[OpOverload, ...]:
    """The dispatcher's overloads of an operation, those with out= excepted.

    function: an overload, a packet, or a function, operator or Tensor method of torch that ATen knows by the same name.

    Returns () for anything else: torch then says nothing about it.
    """
    if isinstance(function, OpOverload):
        return (function,)
    packet: object = function
    if not isinstance(function, OpOverloadPacket):
        name = getattr(function, "__name__", "")
        of_torch = origin_of(function)[0] != "other"
        packet = getattr(torch.ops.aten, name, None) if of_torch and name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return ()
    variants = (getattr(packet, name) for name in packet.overloads())
    return tuple(overload for overload in variants if _dispatched(overload) and not _writes_out(overload))


def _dispatched(overload: OpOverload) -> bool:
    """Whether an overload exists outside of TorchScript, whose own overloads say less."""
    return torch._C._dispatch_has_kernel(overload.name())


def _writes_out(overload: OpOverload) -> bool:
    return any(argument.is_out for argument in overload._schema.arguments)


@functools.cache
def is_seeded(function: Function) -> bool:
    """Whether torch tags an operation as one that may draw random numbers."""
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads(function))


def depends_on_values(function: Function, args: Sequence[object]) -> bool:
    """Whether the size of a result depends on values, as that of a list of places does.

    Torch tags such operations. torch.where of a mask alone is composed of one.
    """
    known = overloads(function)
    tagged = bool(known) and all(torch.Tag.dynamic_output_shape in overload.tags for overload in known)
    return tagged or (function is torch.where and len(args) == 1)


@functools.cache
def writes(function: Function) -> bool:
    """Whether an operation changes one of its arguments."""
    return any(overload._schema.is_mutable for overload in overloads(function))


@functools.cache
def is_functional(function: Function) -> bool:
    """Whether the schemas promise that the result depends on the arguments alone and that nothing else happens.

    The schema of a user's custom operator does not promise this: it has no word for random numbers and side effects.
    """
    known = overloads(function)
    trusted = all(overload.namespace in TRUSTED for overload in known)
    return bool(known) and trusted and not writes(function) and not is_seeded(function)


@functools.cache
def is_view(function: Function) -> bool:
    """Whether the schemas say that the result may be (a view of) the first argument; of no operation is it another one."""
    return any(result.alias_info is not None for overload in overloads(function) for result in overload._schema.returns)


HOLDS_ARGUMENTS = {  # indices and values, of which the schemas say nothing
    torch.sparse_coo_tensor, torch.sparse_compressed_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor,
    torch.sparse_bsr_tensor, torch.sparse_bsc_tensor,
}  # fmt: skip


@functools.cache
def is_fresh(function: Function) -> bool:
    """Whether the schemas promise that the result is in memory of its own.

    Torch checks this promise for operations with a kernel. An operation composed of others (`type_as`, `atleast_1d`) may
    return its argument although its schema does not say so, and a sparse tensor holds what it is made of.
    """
    if function in HOLDS_ARGUMENTS:
        return False
    known = overloads(function)
    composed = (overload.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd) for overload in known)
    return bool(known) and not is_view(function) and not any(composed)


@functools.cache
def written_arguments(function: Function) -> tuple[tuple[int, str], ...]:
    """(position, name) of every argument that a schema marks as written into, arguments for out= excepted."""
    return tuple(
        (position, argument.name)
        for overload in overloads(function)
        for position, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def returns_tensors(function: Function) -> bool | None:
    """Whether the result holds tensors; None where torch has no schema."""
    returns = [result for overload in overloads(function) for result in overload._schema.returns]
    return any("Tensor" in str(result.type) for result in returns) if overloads(function) else None


@functools.cache
def returns_one_tensor(function: Function) -> bool:
    """Whether the schemas promise that the result is a tensor, neither several nor a list of them."""
    returns = [[str(result.type) for result in overload._schema.returns] for overload in overloads(function)]
    return bool(returns) and all(types == ["Tensor"] for types in returns)


@functools.cache
def result_names(function: Function) -> dict[str, int]:
    """{name: position} of an operation's results, where the schemas name several."""
    results = (overload._schema.returns for overload in overloads(function))
    return {
        result.name: i for several in results if len(several) > 1 for i, result in enumerate(several) if result.name
    }
