"""Which tangent belongs to which tensor object, also when tensors share memory and are changed in place."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.ir.tangents import ZERO, Scaled, SymbolicZero

Tangent = Tensor | Scaled | SymbolicZero


class SharedMemory(Exception):
    """A change in place moves tensors in the same memory whose tangents cannot be told. The message says why."""


@dataclass
class Entry:
    """What is known about one tensor object.

    tangent: ZERO, a tensor shaped like its primal, or Scaled.
    detached: whether it is an alias of memory in whose tangent it has no part.
    """

    tangent: Tangent
    detached: bool = False


def memory_of(x: Tensor) -> int | None:
    """Identity of a tensor's memory; None where it has none of its own (sparse, inside of torch.vmap)."""
    own = x.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.untyped_storage()._cdata if own else None


def share_memory(x: Tensor, y: Tensor) -> bool:
    return memory_of(x) is not None and memory_of(x) == memory_of(y)


def owns_memory(x: Tensor) -> bool:
    """Whether torch allocated a tensor's memory, so that no other library, numpy say, sees what happens in it."""
    return memory_of(x) is not None and x.untyped_storage().resizable()


def _overlaps_itself(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.size(), x.stride(), strict=True))


class Table:
    """Side table from tensor object to tangent, held weakly.

    Tensors in one memory are a family. A change in place moves the family to fresh memory first, so that values saved
    by earlier rules for their backward stay, and then rewrites the tangents of all its members.
    """

    def __init__(self) -> None:
        self.entries = WeakTensorKeyDictionary()
        self.families: dict[int, list[weakref.ref[Tensor]]] = {}

    def find(self, x: Tensor) -> Entry | None:
        return self.entries.get(x)

    def record(self, x: Tensor, tangent: Tangent, detached: bool = False) -> None:
        """Enter a tensor object, or enter it anew."""
        is_known = x in self.entries
        self.entries[x] = Entry(tangent, detached)
        if not is_known:
            self.join(x)

    def join(self, x: Tensor) -> None:
        """Count x to the family of its memory. To be called again when x got other memory."""
        memory = memory_of(x)
        if memory is not None:
            self.families.setdefault(memory, []).append(weakref.ref(x))

    def family(self, x: Tensor) -> list[Tensor]:
        """Every known tensor in the memory of x, x included."""
        memory = memory_of(x)
        if memory is None:
            return [x]
        alive = [tensor for reference in self.families.get(memory, ()) if (tensor := reference()) is not None]
        members = {id(tensor): tensor for tensor in alive if memory_of(tensor) == memory}
        self.families[memory] = [weakref.ref(tensor) for tensor in members.values()]
        return list(members.values())

    def separate(self, x: Tensor) -> None:
        """Move the family of x to a copy of its memory; the objects stay, and so does what they share."""
        members = self.family(x)
        memory = x.untyped_storage().clone()
        for member in members:
            offset, size, stride = member.storage_offset(), member.size(), member.stride()
            member.data = member.new_empty(0).set_(memory, offset, size, stride)
            self.join(member)

    def write(self, x: Tensor, y: Tensor, dy: Tangent) -> None:
        """The object x takes the values of y, with tangent dy; what shares its memory sees both.

        Raises SharedMemory.
        """
        others = [member for member in self.family(x) if member is not x]
        unshared = not others and same_form(x, y) and not self.family(y)
        if unshared or share_memory(x, y):  # the first is the common case, the second unsqueeze_ and its like
            x.data = y.data
            self.join(x)
        else:
            self.separate(x)
            x.copy_(y)
        self.retangent(x, dy, others)

    def retangent(self, x: Tensor, dy: Tangent, others: list[Tensor]) -> None:
        """Give x a new tangent, and the rest of its family what follows from it. Raises SharedMemory."""
        entry = self.entries[x]
        varying = [member for member in others if self.entries[member].tangent is not ZERO]
        if entry.detached and others and (varying or dy is not ZERO):
            raise SharedMemory("changes a detached alias of a tensor in place, whose derivative is undefined")
        if isinstance(dy, Tensor) and dy.dtype != x.dtype:
            dy = dy.to(x)
        members = [member for member in others if differentiable(member) and not self.entries[member].detached]
        if members and (varying or dy is not ZERO):
            self._spread(x, dy, members)
        entry.tangent = dy

    def _spread(self, x: Tensor, dy: Tangent, members: list[Tensor]) -> None:
        """Tangents of the members of a family after x, another member, got the tangent dy: scattered into one image of
        the whole memory and read again from there."""
        if any(member.dtype != x.dtype for member in members):
            raise SharedMemory("changes memory in place that is also viewed with another dtype")
        count = x.untyped_storage().nbytes() // x.element_size()
        image = x.new_zeros(count)
        cover = [m for m in members if m.numel() == count and m.is_contiguous() and m.storage_offset() == 0]
        for member in cover[:1] or members:
            tangent = self.entries[member].tangent
            if isinstance(tangent, Tensor):
                if _overlaps_itself(member):
                    raise SharedMemory("changes memory in place that is also seen through an expanded view")
                image = _written(image, member, tangent)
        image = _written(image, x, dy if isinstance(dy, Tensor) else torch.zeros_like(x))
        for member in members:
            size, stride, offset = member.size(), member.stride(), member.storage_offset()
            self.entries[member].tangent = image.as_strided(size, stride, offset)


def _written(image: Tensor, target: Tensor, value: Tensor) -> Tensor:
    """An image of a memory, (entries,), after `value` was written where the tensor `target` is in that memory.

    Not by as_strided_scatter: torch 2.14.1 gives the image the gradient of the entries that were written over.
    """
    numbers = torch.arange(len(image), device=image.device)
    positions = numbers.as_strided(target.size(), target.stride(), target.storage_offset())
    return image.scatter(0, positions.reshape(-1), value.reshape(-1))


def differentiable(x: Tensor) -> bool:
    """Whether a tensor of this type can have a tangent."""
    return x.is_floating_point() or x.is_complex()


def same_form(x: Tensor, y: Tensor) -> bool:
    """Whether one tensor could stand for the other in size, strides, dtype and device."""
    same = x.size() == y.size() and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device
    return same and x.layout is y.layout
