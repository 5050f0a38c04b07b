"""Live duals: tangents carried beside a forward that runs as it is, by the rule table of `fxstn.rules`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fxstn.frontends.live.calls import Call, OperationNote, is_draw, may_return_no_tensor, mutated
from fxstn.frontends.live.constant_guard import ConstantGuard
from fxstn.frontends.live.links import Links, Step
from fxstn.frontends.live.sites import RuntimeSites
from fxstn.frontends.live.tangent_table import (
    SharedMemory,
    Table,
    Tangent,
    differentiable,
    same_form,
    share_memory,
)
from fxstn.frontends.outputs import hidden_in_output
from fxstn.ir.containers import arguments_mapped, attributes, hidden, leaves, mapped, rebuilt, tensors_in
from fxstn.ir.errors import Diagnostic, TransformError, operation_name
from fxstn.ir.facts import is_seeded
from fxstn.ir.spelling import Spelled
from fxstn.ir.tangents import ZERO, Scaled, all_zero
from fxstn.ops.kernels import zeros_tangent
from fxstn.rules import RULES, NoRule, apply_rule, kind_of
from fxstn.rules.layers import dense
from fxstn.rules.loss import is_layer

_NO_RULE = "register one (CONTRIBUTING.md, 'Add a tangent rule'), or freeze the parameters it depends on"
_IN_PLACE = "write it without changing a tensor in place"
# Here values leave torch for Python or another library. Torch has no fact that tells them from sizes and flags, which are
# numbers too but do not vary.
_LEAVES = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__complex__", "__dlpack__", "__reduce_ex__"}


@dataclass(frozen=True)
class RuleResult:
    """What a rule returned, y and dy, and what it got: aliases of the primal values.

    originals: {id of an alias: the tensor that the model holds}.
    step: how y came about; None for a layer.
    """

    y: object
    dy: object
    originals: dict[int, Tensor]
    step: Step | None


class Duals(ConstantGuard):
    """The original forward with a tangent for every tensor.

    parameters: {name: structured tangent}.
    log: None, or a list that gets a note of each operation that a tangent goes through, and of each dropout.

    Primal values are constants, also for autograd. Tangents are computed under the grad mode that is on when this is made.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Scaled],
        sites: RuntimeSites | None = None,
        strengths: Tensor | None = None,
        log: list[OperationNote] | None = None,
    ) -> None:
        super().__init__(model, sites, strengths)
        self.records_gradients = torch.is_grad_enabled()
        self.problems, self.log = list[Diagnostic](), log
        self.table, self.links = Table(), Links()
        self.parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, tensor in attributes(model):
            if not self.is_known(tensor):
                self.table.record(tensor, parameters.get(name, ZERO))

    def is_known(self, x: Tensor) -> bool:
        return self.table.find(x) is not None

    def add_constants(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if not self.is_known(x):
                self.table.record(x, ZERO)

    def tangent(self, x: Tensor) -> Tangent:
        entry = self.table.find(x)
        return ZERO if entry is None else entry.tangent  # unseen: an integer

    def _tangents(self, value: object, axes: tuple[int, ...] = ()) -> object:
        """Tangents of an argument. A parameter's keeps its structure where the rule takes it scaled along one of `axes`."""
        if isinstance(value, Tensor):
            tangent = self.tangent(value)
            return tangent if isinstance(tangent, Scaled) and tangent.axis in axes else dense(tangent)
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self._tangents, value))
        return ZERO

    def note(self, operation: str, kind: str, strengths: tuple[float | int, ...] = ()) -> None:
        if self.log is not None:
            self.log.append(OperationNote(self.path, operation, kind, strengths))

    # Operations

    def observe(self, call: Call) -> object:
        targets, arguments = mutated(call), list(tensors_in((call.args, call.kwargs)))
        self.add_constants(arguments)  # integers that a constructor made, before other objects share their memory
        for x in targets:
            self._check_free(x, operation_name(call.original))
        if call.name == "detach_":
            self.table.record(call.args[0], ZERO, detached=True)
            return call.run()
        varying = [x for x in arguments if self.tangent(x) is not ZERO]
        if is_seeded(call.original):
            self.note(operation_name(call.original), "draw")
        if not varying or self.disabled() or is_draw(call):
            return self._constant(call, targets)
        if call.name in _LEAVES and any(map(differentiable, varying)):
            what = f"{call.name} of a value that varies with the weights, which then has no tangent,"
            raise self.refuse(what, "write x.detach() first where a constant is meant; else compute with tensors")
        if not targets and may_return_no_tensor(call):
            result = call.run()
            if all(map(self.is_known, tensors_in(result))):
                return result
        try:
            with torch.set_grad_enabled(self.records_gradients):
                return self._varying(call)
        except NoRule as reason:
            what = f"{operation_name(call.function)} has no tangent rule ({reason})"
            self.problems.append(self.problem(what, _NO_RULE))
        except SharedMemory as reason:
            self.problems.append(self.problem(f"{operation_name(call.original)} {reason}", _IN_PLACE))
        return self._constant(call, ())

    def _check_free(self, x: Tensor, name: str) -> None:
        """Raises TransformError where a change of x would change a parameter."""
        for member in self.table.family(x):
            if id(member) in self.parameter_names:
                what = f"{name} in place changes '{self.parameter_names[id(member)]}', of the model itself,"
                raise self.refuse(what, "update it outside of the forward")

    def _constant(self, call: Call, targets: Collection[Tensor]) -> object:
        """Carry out an operation that no tangent enters, or that the model wants without gradients."""
        for x in targets:
            others = [member for member in self.table.family(x) if member is not x]
            try:
                if self.disabled() and self.tangent(x) is not ZERO:
                    raise SharedMemory("changes a value that varies, in place and without gradients")
                self.table.separate(x)
                self.table.retangent(x, ZERO, others)
            except SharedMemory as reason:
                self.problems.append(self.problem(f"{operation_name(call.original)} {reason}", _IN_PLACE))
        result = call.run()
        for x in targets:
            self.table.join(x)
        sources = list(tensors_in((call.args, call.kwargs)))
        for y in tensors_in(result):
            if not self.is_known(y):
                self._record(y, ZERO, sources, self.disabled())
        return result

    def _record(self, y: Tensor, dy: Tangent, sources: list[Tensor], detached: bool) -> None:
        """Enter a result. An alias made by detach, or of such an alias, has no part in its memory's tangent."""
        aliases = [x for x in sources if detached or ((entry := self.table.find(x)) and entry.detached)]
        self.table.record(y, dy, any(share_memory(x, y) for x in aliases))

    def _varying(self, call: Call) -> object:
        """Carry out an operation that a tangent enters, by its rule."""
        spelled = call.spelled
        if spelled is None:
            raise NoRule("it changes a tensor in place and has no counterpart by values")
        if spelled.in_place and not isinstance(call.args[0], Tensor):
            raise NoRule("it changes several tensors in place")
        result = self._compute(spelled)
        if spelled.in_place:
            x = call.args[0]
            self.table.write(x, cast(Tensor, result.y).data, cast(Tangent, result.dy))
            for member in self.table.family(x):
                self.links.forget(member)
            self.links.record(x, result.step)
            return x
        sources = list(tensors_in((call.args, call.kwargs)))
        output = self.deliver(result.y, result.dy, result.originals, sources, spelled.function is torch.detach)
        if isinstance(output, Tensor) and result.dy is not ZERO:
            self.links.record(output, result.step)
        return output

    def _compute(self, spelled: Spelled) -> RuleResult:
        """An operation by its rule, on aliases of the primal values that users cannot change in place."""
        rule = RULES.get(spelled.function)
        args: list[object] = []
        tangents: list[object] = []
        originals: dict[int, Tensor] = {}
        before: dict[int, Step] = {}

        def alias(x: Tensor) -> Tensor:
            copy = x.data
            originals[id(copy)] = x
            if step := self.links.find(x):
                before[id(copy)] = step
            return copy

        for position, value in enumerate(spelled.args):
            if isinstance(value, Spelled):
                inner = self._compute(value)
                args.append(inner.y)
                tangents.append(inner.dy)
                before |= {id(inner.y): inner.step} if inner.step else {}
            else:
                args.append(arguments_mapped(alias, value))
                reads = rule.reads.get(position) if rule else None
                tangents.append(self._tangents(value, reads.axes if reads else ()))
        named = {name: self._tangents(value) for name, value in spelled.kwargs.items()}
        kwargs = {name: arguments_mapped(alias, value) for name, value in spelled.kwargs.items()}
        if not (all_zero(tangents) and all_zero(named)):
            self.note(operation_name(spelled.function), kind_of(spelled.function, tangents))
        try:
            y, dy = apply_rule(spelled.function, tuple(tangents), tuple(args), kwargs, named)
        except (RuntimeError, NotImplementedError) as error:
            if rule is not None:
                raise
            raise NoRule(f"torch.func.jvp fails on it: {str(error).partition(chr(10))[0]}") from error
        function = spelled.function
        step = None if is_layer(function) else Step(function, tuple(args), kwargs, tuple(tangents), named, before)
        return RuleResult(y, dy, originals, step)

    def deliver(
        self, y: object, dy: object, originals: dict[int, Tensor], sources: list[Tensor], detached: bool
    ) -> object:
        """What the model gets: each result as an object of its own, or the very argument where it was handed through."""
        if isinstance(y, Tensor):
            if id(y) in originals:
                return originals[id(y)]
            result = y.data
            if not differentiable(y):
                dy = ZERO
            elif isinstance(dy, Tensor) and dy.dtype != y.dtype:
                dy = dy.to(y)
            self._record(result, cast(Tangent, dy), sources, detached)
            return result
        if isinstance(y, (tuple, list)) and not isinstance(y, torch.Size):
            tangents = dy if isinstance(dy, (tuple, list)) else [ZERO] * len(y)
            pairs = zip(y, tangents, strict=True)
            entries = [self.deliver(*pair, originals, sources, detached) for pair in pairs]
            return rebuilt(y, entries)
        return y

    def leave_function(self, args: tuple, output: object) -> object:
        """A custom function that hands an input through returns it as another object."""
        for y in tensors_in(output):
            if not self.is_known(y):
                same = [x for x in tensors_in(args) if share_memory(x, y) and same_form(x, y)]
                for x in same[:1]:
                    self.table.record(y, self.tangent(x))
        return output

    # Outputs

    def finish(self, output: object) -> None:
        """Raises TransformError with every problem of the run."""
        values = leaves(output)
        self.check_known("the output", values)
        for leaf in values:
            if not isinstance(leaf, Tensor) and any(self.tangent(x) is not ZERO for x in hidden(leaf)):
                what, remedy = hidden_in_output(leaf, output)
                self.problems.append(Diagnostic("", what, "", remedy))
        if self.problems:
            raise TransformError(list(dict.fromkeys(self.problems)))

    def tangents_of(self, output: object) -> object:
        """dy in the structure of the output: real zeros where nothing varies, None for leaves that are not float."""

        def of_leaf(leaf: object) -> object:
            dy = dense(self.tangent(leaf)) if isinstance(leaf, Tensor) else ZERO
            return zeros_tangent(leaf) if dy is ZERO else dy

        return mapped(of_leaf, output)

    def linearized(self, output: object) -> object:
        """y + dy, or what softmax, sigmoid and losses make of the linearised values before them (paper, Eq. 3.13)."""
        steps = {id(x): step for x in leaves(output) if isinstance(x, Tensor) and (step := self.links.find(x))}
        losses = {id(x) for x in leaves(output) if id(x) in steps and (not x.dim() or steps[id(x)].is_loss)}
        others = {step for key, step in steps.items() if key not in losses}

        def of_leaf(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            step, is_loss = steps.get(id(leaf)), id(leaf) in losses
            if step is not None and (is_loss or step.is_link):
                return step.linearized(others, is_loss)
            dy = dense(self.tangent(leaf))
            return leaf if dy is ZERO else leaf.data + dy

        return mapped(of_leaf, output)
