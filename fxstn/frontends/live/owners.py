"""Which example each entry of a value belongs to, while a forward runs: what one operation makes of the owners of its operands.

Owners are numbers that broadcast with a value (`fxstn.ir.tangents.Owners`): (batch, 1, 1) of a plain batch, (rows, 1) of
tokens that were picked for an expert. Where an axis goes is known of products and of what works entry by entry
(`operand_axes`). Of any other operation its own tangent rule tells (`ratios`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxstn.frontends.live.ratios import (
    OF_DATA,
    Operand,
    Structure,
    argument_key,
    compress,
    decode,
    is_real,
    ratios,
    rows_of,
)
from fxstn.ir.containers import tensors_in
from fxstn.ir.facts import depends_on_values
from fxstn.ir.tangents import FREE, JOINED, UNOWNED, BatchAxis, Owners, Place
from fxstn.ops.synced import BATCH_NORMS
from fxstn.rules import RULES
from fxstn.rules.operand_axes import axis_use

ENTRYWISE = {torch.where, torch.masked_fill}  # besides those whose rules say so
KEEPS = {torch.clone, torch.detach, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half,
         Tensor.bfloat16, Tensor.contiguous, Tensor.cpu, Tensor.cuda}  # fmt: skip
LOST = "lost"  # in place of owners: examples go into a result, but where they are is not known


class Locator:
    """Finds the owners of what operations return, and remembers what does not depend on values.

    examples: of a batch.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.interned: dict[tuple[int, BatchAxis, torch.device], Owners] = {}
        self.regular: dict[Owners, BatchAxis] = {}
        self.known: dict[Hashable, Any] = {}

    def at(self, axis: BatchAxis, rank: int, device: torch.device) -> Owners:
        """Owners of a value in which the examples are along one axis; the same object each time."""
        if (rank, axis, device) not in self.interned:
            numbers = torch.arange(self.examples, device=device)
            numbers = numbers[None, :, None].expand(axis.left, -1, axis.right).reshape(-1)
            owners = Owners(numbers.view([-1 if i == axis.axis else 1 for i in range(rank)]))
            self.interned[rank, axis, device], self.regular[owners] = owners, axis
        return self.interned[rank, axis, device]

    def place(self, owners: Owners) -> Place:
        return self.regular.get(owners, owners)

    def move(self, owners: Owners, dims: Sequence[int | None], rank: int) -> Owners:
        """Owners whose axes are those of a value of another rank. dims: of each axis, None for one of size 1."""
        if owners in self.regular:
            where = self.regular[owners]
            dim = dims[where.axis]
            assert dim is not None
            return self.at(where._replace(axis=dim), rank, owners.numbers.device)
        axes = sorted((dim, axis) for axis, dim in enumerate(dims) if dim is not None)
        numbers = owners.numbers.permute([axis for _, axis in axes] + [a for a, d in enumerate(dims) if d is None])
        shape = [1] * rank
        for dim, axis in axes:
            shape[dim] = owners.numbers.shape[axis]
        return Owners(numbers.reshape(shape))

    def join(self, several: Sequence[Owners], rank: int) -> Owners:
        """Owners of what is computed entry by entry from values that are broadcast against each other."""
        aligned = []
        for owners in dict.fromkeys(several):
            own = owners.numbers
            dims = [
                rank - own.dim() + i if size > 1 or owners in self.regular else None for i, size in enumerate(own.shape)
            ]
            aligned.append(owners if own.dim() == rank else self.move(owners, dims, rank))
        result, *others = sorted(dict.fromkeys(aligned), key=lambda owners: owners.numbers.numel())
        for other in others:
            result = _both(result, other)
        return result

    # One operation

    def owners(
        self, function: Callable[..., Any], args: tuple, kwargs: dict, operands: Sequence[Operand]
    ) -> list | str | None:
        """Owners of each tensor that an operation returns; None where it depends on no example, or lists places.

        Raises LookupError where it varies and that is not known.
        """
        rule = RULES.get(function)
        if depends_on_values(function, args) and (rule is None or rule.kind == "zero" or function is torch.where):
            return None  # as many rows as the batch has would be by chance
        labelled = [
            o for o in operands if o.owners is not None and (o.varies or is_real(o.value) or not self.joins(o.owners))
        ]
        varying = [operand for operand in labelled if operand.varies]
        if not varying or len(varying) == len(labelled):
            return self._owners(function, args, kwargs, operands, labelled) if labelled else None
        with suppress(LookupError):  # what does not vary tells of rows that nothing varying goes into
            result = self._owners(function, args, kwargs, operands, labelled)
            if not isinstance(result, str) and not any(own and self.joins(own) for own in result):
                return result
        return self._owners(function, args, kwargs, operands, varying)  # a mask, say, has examples nowhere

    def _owners(
        self,
        function: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        operands: Sequence[Operand],
        labelled: list[Operand],
    ) -> list | str:
        """The same, where these operands tell of examples."""
        first = labelled[0].owners
        if function in BATCH_NORMS or (function in KEEPS and len(operands) == 1):
            return [first]
        if function is F.embedding and labelled[0].path == (0,):
            assert first is not None
            numbers = first.numbers
            where = self.regular.get(first)
            return [
                Owners(numbers.unsqueeze(-1)) if where is None else self.at(where, numbers.dim() + 1, numbers.device)
            ]
        rule = RULES.get(function)
        if function in ENTRYWISE or (rule is not None and rule.elementwise):
            rank = max(operand.value.dim() for operand in operands)
            return [self.join([o.owners for o in labelled if o.owners is not None], rank)]
        moved = self._along_axes(function, args, kwargs, labelled)
        return self._tried(function, args, kwargs, operands, labelled) if moved is None else [moved]

    def _along_axes(
        self, function: Callable[..., Any], args: tuple, kwargs: dict, labelled: list[Operand]
    ) -> Owners | None:
        """Where it is known what becomes of each axis of the examples."""
        results = []
        for operand in labelled:
            assert operand.owners is not None
            shape, where = operand.owners.numbers.shape, self.regular.get(operand.owners)
            axes = [where.axis] if where else [axis for axis, size in enumerate(shape) if size > 1]
            if not isinstance(operand.path[0], int) or (not axes and len(labelled) > 1):
                return None
            uses = [axis_use(function, args, operand.path, axis, operand.value.dim()) for axis in axes]
            if any(use is None or use.partner is not None for use in uses):
                return None
            rank = self._rank(function, args, kwargs)
            if rank is None:  # several results
                return None
            dims: list[int | None] = [None] * len(shape)
            for axis, use in zip(axes, uses, strict=True):
                assert use is not None
                dims[axis] = use.dimension(args) % rank
            results.append(self.move(operand.owners, dims, rank))
        return self.join(results, results[0].numbers.dim())

    def _rank(self, function: Callable[..., Any], args: tuple, kwargs: dict) -> int | None:
        key = ("rank", function, argument_key((args, kwargs), lambda x: x.dim()))
        if key not in self.known:
            with torch.no_grad():
                y = function(*args, **kwargs)
            self.known[key] = y.dim() if isinstance(y, Tensor) else None
        return self.known[key]

    def _tried(self, function: Callable[..., Any], args: tuple, kwargs: dict, operands: Sequence[Operand],
               labelled: list[Operand]) -> list | str:  # fmt: skip
        owners = {id(operand.value): operand.owners for operand in labelled}
        key = (function, argument_key((args, kwargs), lambda x: (x.shape, x.dtype, owners.get(id(x)))))
        if key in self.known:
            return self.known[key]
        numbers = {id(o.value): o.owners.numbers for o in labelled if o.owners is not None}
        both = ratios(function, args, kwargs, numbers)
        result: list[Owners | None] | None = None
        if both is not None:
            y, codes = both
            results = list(tensors_in(y))
            result = [self._of_codes(c, labelled[0], x) for c, x in zip(codes, results, strict=True)]
            steady = all(owner is None or owner in self.regular for owner in result)
            steady = steady and not any(c is not None and bool(c.isnan().all()) for c in codes)
            if steady and all(map(is_real, results)) and not _picks(function, args, kwargs, operands):
                self.known[key] = result
            return result
        if any(operand.varies for operand in labelled):
            raise LookupError
        return LOST

    def _of_codes(self, codes: Tensor | None, operand: Operand, y: Tensor) -> Owners | None:
        if codes is None:
            return self._by_shape(operand, y)
        numbers = compress(decode(codes, self.examples), self.examples)
        if bool((numbers == FREE).all()):  # an activation whose inputs are all cut off, or no entries at all
            return self._by_shape(operand, y) or Owners(numbers.new_full([1] * y.dim(), FREE))
        return self._regular(numbers)

    def _regular(self, numbers: Tensor) -> Owners:
        """The interned owners of these numbers, where they are regular."""
        axes = [axis for axis, size in enumerate(numbers.shape) if size > 1]
        if len(axes) == 1 and self.examples > 1 and numbers.numel() % self.examples == 0:
            flat, size = numbers.flatten(), numbers.numel() // self.examples
            position = torch.arange(len(flat), device=flat.device)
            for right in (r for r in range(1, size + 1) if size % r == 0):
                if torch.equal(flat, position // right % self.examples):
                    return self.at(BatchAxis(axes[0], size // right, right), numbers.dim(), numbers.device)
        return Owners(numbers)

    def _by_shape(self, operand: Operand, y: Tensor) -> Owners | None:
        """Owners of a result without a tangent, such as an index or a mask, that has the first dimensions of an operand."""
        assert operand.owners is not None
        numbers, shape = operand.owners.numbers, operand.value.shape
        last = max((axis for axis, size in enumerate(numbers.shape) if size > 1), default=0)
        if y.shape[: last + 1] != shape[: last + 1] or y.dim() <= last:
            return None
        dims = [axis if size > 1 or axis == last else None for axis, size in enumerate(numbers.shape)]
        return self.move(operand.owners, dims, y.dim())

    def unowned(self, owners: Owners) -> Owners:
        """Owners of what reads weights: entries without an example then belong to none, but vary."""
        if owners in self.regular or not bool((owners.numbers == FREE).any()):
            return owners
        return Owners(torch.where(owners.numbers == FREE, UNOWNED, owners.numbers))

    def lost(self, y: Tensor) -> Owners:
        """Owners of a value in which examples are somewhere."""
        return Owners(torch.full([1] * y.dim(), JOINED, device=y.device))

    def joins(self, owners: Owners) -> bool:
        """Whether examples meet in some entry."""
        return owners not in self.regular and bool((owners.numbers == JOINED).any())

    def rows_after(self, function: Callable[..., Any], args: tuple, kwargs: dict, path: tuple, value: Tensor, axis: int,
             y: Structure) -> list[tuple[int, Tensor | None] | None]:  # fmt: skip
        """Of each result, the axis that an axis of one operand becomes and the row there of each position; None for neither.

        Rows None: all of them in order.
        """
        single = isinstance(y, Tensor)
        if single and not kwargs and isinstance(path[0], int):
            use = axis_use(function, args, path, axis, value.dim())
            if use is not None and use.partner is None and y.shape[use.dimension(args) % y.dim()] == value.shape[axis]:
                return [(use.dimension(args) % y.dim(), None)]
        key = ("rows", function, argument_key((args, kwargs), lambda x: (x.shape, x.dtype)), path, axis)
        if key not in self.known:
            rows = torch.arange(value.shape[axis], device=value.device)
            both = ratios(function, args, kwargs,
                           {id(value): rows.view([-1 if i == axis else 1 for i in range(value.dim())])})  # fmt: skip
            if both is None:
                return [None] * len(list(tensors_in(y)))
            result = [rows_of(codes, len(rows)) for codes in both[1]]
            if any(isinstance(x, Tensor) and not x.is_floating_point() for x in tensors_in((args, kwargs))):
                return [entry and entry[0] for entry in result]
            if any(entry is None or not entry[1] for entry in result):
                return [entry and entry[0] for entry in result]
            self.known[key] = [entry and entry[0] for entry in result]
        return self.known[key]


class Unlocated(ValueError):
    """Perturbations per example cannot go on.

    place: where, and why.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.place = f"module '{path}', where {reason}"
        super().__init__(
            f"{f'module {path!r}' if path else 'the model'}: one perturbation per example is refused, because {reason}; pass "
            "delta and condition of shape (h,), or perturb='batch' to the losses and the runner"
        )


def _both(first: Owners, other: Owners) -> Owners:
    a, b = torch.broadcast_tensors(first.numbers, other.numbers)
    if bool(((b == a) | (b == FREE)).all()):
        return first
    if bool(((a == b) | (a == FREE)).all()):
        return other
    return Owners(torch.where(a == FREE, b, torch.where((b == FREE) | (a == b), a, JOINED)))


def _picks(function: Callable[..., Any], args: tuple, kwargs: dict, operands: Sequence[Operand]) -> bool:
    """Whether integers or masks among the operands may say which entries are picked."""
    rule = RULES.get(function)
    data = rule is not None and rule.kind in OF_DATA
    return any(not is_real(operand.value) and not (data and operand.path[:1] == (0,)) for operand in operands)
