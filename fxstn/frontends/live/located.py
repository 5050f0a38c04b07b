"""Live duals with one perturbation per example: every value has owners beside its tangent, and each row of a layer its scales.

A value that all examples share, because it is computed from parameters alone, keeps the structure of its tangent as long as it
has one, s ⊙ R, and has one tangent for each example where it has none. Both become tangents of rows where the value meets one
that has owners.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.frontends.live.calls import Call, OperationNote, is_draw
from fxstn.frontends.live.duals import Duals, RuleResult
from fxstn.frontends.live.owners import LOST, Locator, Unlocated
from fxstn.frontends.live.ratios import Operand, is_real
from fxstn.frontends.live.shared import Shared, SharedOperation, dense_rows
from fxstn.frontends.live.sites import RuntimeSites
from fxstn.ir.containers import leaves, reachable, tensors_in
from fxstn.ir.errors import operation_name
from fxstn.ir.spelling import Spelled
from fxstn.ir.tangents import BATCH_FIRST, ZERO, Owners, Place, Scaled
from fxstn.ops.batch_axis import listed_examples, lists
from fxstn.ops.noise import one_for_all_examples
from fxstn.rules import NoRule


class LocatedDuals(Duals):
    """Duals of a perturbation per example.

    parameters: {name: structured tangent, with scales (batch, n)}.
    strengths: (h,), or (batch, h).
    locator: for this number of examples.

    Raises Unlocated where a layer reads a value in which examples meet.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, Scaled], locator: Locator, sites: RuntimeSites | None = None,
                 strengths: Tensor | None = None, log: list[OperationNote] | None = None) -> None:  # fmt: skip
        super().__init__(model, parameters, sites, strengths, log)
        self.locator, self.of_values = locator, WeakTensorKeyDictionary()
        self.shared_strengths = set[int]()
        self.reads_unowned = False  # whether weights have been read beside rows that are no example's
        self.results: Sequence[Owners | None] | str | None = None  # of the operation that was computed last

    def add_examples(self, inputs: object) -> None:
        """Inputs as long as the batch hold examples, or it lists them (`fxstn.ops.batch_axis.batch_size`)."""
        count = self.locator.examples
        if listed_examples(inputs) == count:
            for entries in tree_leaves(inputs, is_leaf=lambda value: lists(value, (Tensor, dict), count)):
                for i, entry in enumerate(entries if lists(entries, (Tensor, dict), count) else ()):
                    for x in tree_leaves(entry):
                        if isinstance(x, Tensor) and x.dim():
                            self.of_values[x] = Owners(torch.full([1] * x.dim(), i, device=x.device))
            return
        for _, x in reachable(inputs, ""):
            if x.dim() and len(x) == count and x.layout is torch.strided:
                self.of_values[x] = self.locator.at(BATCH_FIRST, x.dim(), x.device)

    # Owners

    def _operands(self, args: tuple, kwargs: dict) -> list[Operand]:
        result: list[Operand] = []

        def enter(value: object, path: tuple) -> None:
            if isinstance(value, Tensor):
                result.append(Operand(path, value, self.of_values.get(value), self.tangent(value) is not ZERO))
            elif isinstance(value, (tuple, list)):
                for i, entry in enumerate(value):
                    enter(entry, (*path, i))

        for i, value in enumerate(args):
            enter(value, (i,))
        for name, value in kwargs.items():
            enter(value, (name,))
        return result

    def _locate(self, spelled: Spelled, operands: Sequence[Operand]) -> Sequence[Owners | None] | str | None:
        try:
            return self.locator.owners(spelled.function, spelled.args, spelled.kwargs, operands)
        except LookupError:
            what = f"{operation_name(spelled.function)} has no tangent rule that says which example an entry belongs to"
            raise Unlocated(self.path, what) from None

    def _own(self, output: object, owners: Sequence[Owners | None] | str | None) -> None:
        results = list(tensors_in(output))
        if owners is LOST:
            owners = [self.locator.lost(y) if is_real(y) else None for y in results]
        for y, own in zip(results, owners or [None] * len(results), strict=False):
            if own is not None:
                self.of_values[y] = own
            else:
                self.of_values.pop(y, None)

    def _own_written(self, x: Tensor, owners: Sequence[Owners | None] | str | None) -> None:
        """The owners of a value that was written into. What shares its memory has other ones then."""
        before = self.of_values.get(x)
        self._own(x, owners)
        others = [member for member in self.table.family(x) if member is not x]
        if others and self.of_values.get(x) is not before:
            if any(self.tangent(member) is not ZERO for member in others):
                raise Unlocated(
                    self.path, "a value is written into through a view of it, so that its examples are not known"
                )
            for member in others:
                self._own(member, LOST)

    # Random operations

    def strength_of(self, index: int, x: object) -> tuple[Tensor, Place]:
        assert self.strengths is not None
        strength = self.strengths[..., index]
        if not strength.dim() or not isinstance(x, Tensor):
            return strength, BATCH_FIRST
        owners = self.of_values.get(x)
        if owners is None:  # all examples share the value, and the draw
            self.shared_strengths.add(index)
            where = f"a random operation in '{self.path}'"
            return one_for_all_examples(strength, self.strengths, index, where), BATCH_FIRST
        if self.locator.joins(owners):
            raise Unlocated(
                self.path, "a random operation, which reads one strength per example, has a value of no single example"
            )
        return strength, self.locator.place(owners)

    def operate(self, call: Call, indices: tuple[int, ...] | None) -> object:
        if indices is not None and self.strengths is not None and self.strengths.dim() > 1:
            for x in tensors_in(call.args[:1]):
                if self.strength_of(indices[0], x)[1] != BATCH_FIRST:
                    raise Unlocated(
                        self.path, "a random operation takes the examples along dimension 0, where they are not"
                    )
        return super().operate(call, indices)

    # Operations

    def _constant(self, call: Call, targets: Collection[Tensor]) -> object:
        owners = self._of_constant(call) if targets else None
        result = super()._constant(call, targets)
        for x in targets if call.spelled is not None else ():  # other mutations leave the rows where they are
            self._own_written(x, owners)
        if not targets and next(tensors_in(result), None) is not None and not self._handed_through(call, result):
            self._own(result, self._of_constant(call))
        return result

    def _of_constant(self, call: Call) -> Sequence[Owners | None] | str | None:
        if call.spelled is None or is_draw(call) or any(isinstance(value, Spelled) for value in call.spelled.args):
            return None
        return self._locate(call.spelled, self._operands(call.spelled.args, call.spelled.kwargs))

    def _handed_through(self, call: Call, result: object) -> bool:
        sources = {id(x) for x in tensors_in((call.args, call.kwargs))}
        return any(id(y) in sources for y in tensors_in(result))

    def _varying(self, call: Call) -> object:
        if call.spelled is not None and call.spelled.in_place:
            family = self.table.family(call.args[0])
            sources = tensors_in((call.args, call.kwargs, family))
            if len(family) > 1 and any(isinstance(self.tangent(x), Shared) for x in sources):
                raise NoRule("it changes in place what is computed from parameters alone, and is seen elsewhere")
        output = super()._varying(call)
        if call.spelled is not None and call.spelled.in_place:
            self._own_written(call.args[0], self.results)
        elif not self._handed_through(call, output):
            self._own(output, self.results)
        return output

    def _compute(self, spelled: Spelled) -> RuleResult:
        spelled = self._flat(spelled)
        operands = self._operands(spelled.args, spelled.kwargs)
        owners = self._locate(spelled, operands)
        if not any(isinstance(self.tangent(operand.value), Shared) for operand in operands):
            result = super()._compute(spelled)
        else:
            operation = SharedOperation(self, self.locator, spelled, operands)
            if isinstance(owners, str):
                what = f"{operation_name(spelled.function)} reads weights and a value whose examples are not known"
                raise Unlocated(self.path, what)
            if owners is None or owners[0] is None:
                result = operation.of_shared()
            else:
                result = operation.of_rows(owners)
                before, owners = owners, [own and self.locator.unowned(own) for own in owners]
                self.reads_unowned |= any(a is not b for a, b in zip(before, owners, strict=True))
        self.results = owners
        return result

    def _flat(self, spelled: Spelled) -> Spelled:
        """An operation whose operands are values: what was to be computed first is."""
        if not any(isinstance(value, Spelled) for value in spelled.args):
            return spelled

        def first(value: object) -> object:
            if not isinstance(value, Spelled):
                return value
            result = self._compute(value)
            output = self.deliver(result.y, result.dy, result.originals, [], value.function is torch.detach)
            if isinstance(output, Tensor):
                self._own(output, self.results)
                self.links.record(output, result.step)
            return output

        return replace(spelled, args=tuple(map(first, spelled.args)))

    # Outputs

    def finish(self, output: object) -> None:
        super().finish(output)
        for leaf in leaves(output):
            if isinstance(leaf, Tensor) and isinstance(tangent := self.tangent(leaf), Shared):
                if leaf.dim():
                    raise Unlocated(self.path, "an output is computed from weights and from no value of an example")
                self.table.record(leaf, torch.stack([rows.mean(0) for rows in dense_rows(tangent)]).sum(0))
            elif isinstance(leaf, Tensor) and self.reads_unowned and self.tangent(leaf) is not ZERO:
                own = self.of_values.get(leaf)
                if own is None or bool((own.numbers < 0).any()):
                    raise Unlocated(self.path, "an output depends on rows of a layer that belong to no example")
