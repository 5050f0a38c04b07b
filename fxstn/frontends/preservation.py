"""A forward that is run to look at it leaves the model and the inputs as they were, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxstn.frontends.module_state import module_state, restore
from fxstn.ir.containers import attributes, mapped, reachable

Inputs = TypeVar("Inputs")


class Preservation(Generic[Inputs]):
    """A context for forwards of a model, which may write into whatever they reach: afterwards all of it has its value back.

    model: parameters, buffers, attributes of its modules, and every tensor that an attribute reaches.
    inputs: any structure. The context gives stand-ins for it, see `stand_ins`; the forward is to be run on those.
    but: tensors that are left out, because they are written anew before each forward.

    The values to come back to are those at the time of construction. The context may be entered several times, one after the
    other.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, but: Iterable[Tensor] = ()) -> None:
        self.inputs, self.state = inputs, module_state(model)
        out = {id(tensor) for tensor in but}
        tensors = (tensor for _, tensor in (*attributes(model), *reachable(inputs, "")) if id(tensor) not in out)
        self.saved = [SavedTensor(tensor) for tensor in distinct(tensors)]

    def __enter__(self) -> Inputs:
        return stand_ins(self.inputs)

    def __exit__(self, *error: object) -> None:
        restore(self.state)
        for tensor in self.saved:
            tensor.restore()


def stand_ins(inputs: Inputs) -> Inputs:
    """The same values in containers and tensor objects of their own, over the memory of the originals.

    A forward that resizes an input, writes a value with a gradient into it or removes it from a dict does so to the stand-in.
    An inference tensor is copied to an ordinary one, because autograd refuses inference tensors.
    """
    known: dict[int, Tensor] = {}

    def stand_in(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            alias = leaf.clone() if leaf.is_inference() else leaf.detach()
            known[id(leaf)] = alias.requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    with torch.inference_mode(False):
        result: Inputs = mapped(stand_in, inputs)
    return result


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Every tensor object once, in order."""
    return list({id(tensor): tensor for tensor in tensors}.values())


class SavedTensor:
    """A tensor object, the memory that it shows, and the bytes in that memory; nothing of a tensor without values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.requires_grad = tensor, tensor.requires_grad
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self.alias = tensor.detach()
            self.memory = _memory(tensor)
            self.value = None if self.memory is None else self.memory.clone()

    def restore(self) -> None:
        """Give the object its memory back, and the memory its bytes. Nothing is written where nothing has changed, because
        the memory may be read-only (numpy.memmap)."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self.memory is not None and self.value is not None and not _equal(self.memory, self.value):
                self.memory.copy_(self.value)
            if self.tensor.grad_fn is not None and not self.requires_grad:
                self.tensor.detach_()  # a value with a gradient was written into it
            if self.tensor.is_leaf:
                self.tensor.requires_grad_(self.requires_grad)
            if not _shows(self.tensor, self.alias):
                self.tensor.data = self.alias


def _memory(x: Tensor) -> Tensor | None:
    """The bytes from a tensor's first entry to its last, (bytes,), over its own memory.

    Returns the tensor itself where it is more than one piece of plain memory (sparse, nested, quantized), None where it has no
    values (on the meta device, of FakeTensorMode).
    """
    if x.is_meta or isinstance(x, FakeTensor):
        return None
    if not _is_plain(x) or not x.numel():
        return x
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.size(), x.stride(), strict=True))
    span = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), x.storage_offset(), (size,), (1,))
    return span.view(torch.uint8)


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is sizes and strides over one piece of memory."""
    special = x.layout is not torch.strided or x.is_nested or x.is_quantized
    return not special and not is_traceable_wrapper_subclass(x)


def _equal(memory: Tensor, value: Tensor) -> bool:
    """Whether nothing was written into a memory; of a special tensor this is not known."""
    return _is_plain(memory) and torch.equal(memory, value)


def _shows(x: Tensor, y: Tensor) -> bool:
    """Whether two tensor objects show the same memory in the same way."""
    if not (_is_plain(x) and _is_plain(y)):
        return x.layout is y.layout

    def place(z: Tensor) -> tuple[object, ...]:
        return z.untyped_storage()._cdata, z.storage_offset(), z.size(), z.stride(), z.dtype

    return place(x) == place(y)
