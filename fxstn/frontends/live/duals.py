"""Live duals: tangents carried beside a forward that runs as it is, by the rule table of `fxstn.rules`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxstn.frontends.live.constant_guard import ConstantGuard, mutated
from fxstn.frontends.live.containers import arguments_mapped, attributes, leaves, mapped, tensors_in
from fxstn.frontends.live.tangent_table import SharedMemory, Table, differentiable, same_form, share_memory
from fxstn.frontends.live.tracer import Call, Sites
from fxstn.ir.errors import TransformError, operation_name
from fxstn.ir.spelling import Spelled
from fxstn.ir.tangents import ZERO, Scaled, all_zero
from fxstn.ir.vocabulary import LINKS, VIEWS
from fxstn.ops.kernels import zeros_tangent
from fxstn.rules import RULES, NoRule, apply_rule, kind_of
from fxstn.rules.layers import dense

_NO_RULE = "register one (CONTRIBUTING.md, 'add a rule'), or freeze the parameters it depends on"
_IN_PLACE = "write it without changing a tensor in place"
# What a tensor says about itself, and values that leave torch without a derivative of their own: no tangent comes out.
_ABOUT = {"__bool__", "__index__", "__hash__", "__repr__", "__format__", "stride", "storage_offset", "untyped_storage",
          "is_contiguous", "is_floating_point", "is_complex", "is_signed", "data_ptr", "element_size", "get_device",
          "type", "__contains__", "storage", "nelement", "ndimension",
          "is_same_size", "_assert", "is_tensor", "result_type", "can_cast", "is_inference", "is_nonzero"}  # fmt: skip
_VIEWED = {"T", "mT", "H", "mH", "real", "imag"}
_FILLS = {"zero_", "normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"}
_LEAVES = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__complex__", "__dlpack__", "__reduce_ex__"}


@dataclass(frozen=True)
class Note:
    """An operation in a module. kind: of its rule, or "dropout", with an index into λ or a rate as its strength."""

    module: str
    operation: str
    kind: str
    strength: float | int | None


@dataclass(frozen=True)
class Computed:
    """Results of a rule, the primal values and tangents it got, and whose alias each of its arguments is."""

    y: Any
    dy: Any
    args: list[Any]
    tangents: list[Any]
    originals: dict[int, Tensor]


@dataclass(frozen=True)
class Link:
    """A value link(z) whose last function is softmax or its like: the linearised output is link(z + dz)."""

    link: Callable[[Tensor], Tensor]
    z: Tensor
    dz: Tensor


class Duals(ConstantGuard):
    """The original forward with a tangent for every tensor.

    parameters: structured tangents by name. Primal values are constants, also for autograd; tangents are computed under
    the grad mode that is on when this is made. log: None, or a list that gets a note of each operation that a tangent goes
    through and of each dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Scaled],
        sites: Sites | None = None,
        strengths: Tensor | None = None,
        log: list[Note] | None = None,
    ) -> None:
        super().__init__(model, sites, strengths)
        self.recording = torch.is_grad_enabled()
        self.problems, self.log = [], log
        self.table, self.links = Table(), WeakTensorKeyDictionary()
        self.fixed = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, tensor in attributes(model):
            if not self.known(tensor):
                self.table.record(tensor, parameters.get(name, ZERO))

    def known(self, x: Tensor) -> bool:
        return self.table.find(x) is not None

    def made(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if not self.known(x):
                self.table.record(x, ZERO)

    def tangent(self, x: Tensor) -> Any:
        entry = self.table.find(x)
        return ZERO if entry is None else entry.tangent  # unseen: an integer

    def _tangents(self, value: Any, axes: tuple[int, ...] = ()) -> Any:
        """Tangents of an argument; a parameter's keeps its structure where the rule takes it scaled along one of `axes`."""
        if isinstance(value, Tensor):
            tangent = self.tangent(value)
            return tangent if isinstance(tangent, Scaled) and tangent.axis in axes else dense(tangent)
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self._tangents, value))
        return ZERO

    def note(self, operation: str, kind: str, strength: float | int | None = None) -> None:
        if self.log is not None:
            self.log.append(Note(self.path, operation, kind, strength))

    # Operations

    def observe(self, call: Call) -> Any:
        name, changed = getattr(call.original, "__name__", ""), mutated(call)
        for x in changed:
            self._check_free(x, operation_name(call.original))
        if name == "detach_":
            self.table.record(call.args[0], ZERO, cut=True)
            return call.run()
        varying = [x for x in tensors_in((call.args, call.kwargs)) if self.tangent(x) is not ZERO]
        if not varying or self.disabled() or name in _FILLS:
            return self._constant(call, changed)
        if _is_about(call, name):
            result = call.run()
            if all(self.known(y) for y in tensors_in(result)):
                return result
        if name in _LEAVES and any(map(differentiable, varying)):
            what = f"{name} of a value that varies with the weights, which then has no tangent,"
            raise self.refuse(what, "write x.detach() first where a constant is meant; else compute with tensors")
        try:
            with torch.set_grad_enabled(self.recording):
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
            if id(member) in self.fixed:
                what = f"{name} in place changes '{self.fixed[id(member)]}', of the model itself,"
                raise self.refuse(what, "update it outside of the forward")

    def _constant(self, call: Call, changed: Collection[Tensor]) -> Any:
        """Carry out an operation that no tangent enters, or that the model wants without gradients."""
        for x in changed:
            others = [member for member in self.table.family(x) if member is not x]
            try:
                if self.disabled() and self.tangent(x) is not ZERO:
                    raise SharedMemory("changes a value that varies, in place and without gradients")
                self.table.separate(x)
                self.table.retangent(x, ZERO, others)
            except SharedMemory as reason:
                self.problems.append(self.problem(f"{operation_name(call.original)} {reason}", _IN_PLACE))
        result = call.run()
        for x in changed:
            self.table.join(x)
        sources = list(tensors_in((call.args, call.kwargs)))
        for y in tensors_in(result):
            if not self.known(y):
                self._record(y, ZERO, sources, self.disabled())
        return result

    def _record(self, y: Tensor, dy: Any, sources: list[Tensor], cut: bool) -> None:
        """Enter a result; an alias made by detach, or of such an alias, is cut off from its memory's tangent."""
        aliased = [x for x in sources if cut or ((entry := self.table.find(x)) and entry.cut)]
        self.table.record(y, dy, any(share_memory(x, y) for x in aliased))

    def _varying(self, call: Call) -> Any:
        """Carry out an operation that a tangent enters, by its rule."""
        spelled = call.spelled
        if spelled is None:
            raise NoRule("it changes a tensor in place and has no counterpart by values")
        if spelled.in_place and not isinstance(call.args[0], Tensor):
            raise NoRule("it changes several tensors in place")
        done = self._compute(spelled)
        if spelled.in_place:
            x = call.args[0]
            self.table.write(x, done.y.data, done.dy)
            for member in self.table.family(x):
                self.links.pop(member, None)
            return x
        sources = list(tensors_in((call.args, call.kwargs)))
        result = self._delivered(done.y, done.dy, done.originals, sources, spelled.function is torch.detach)
        if isinstance(result, Tensor) and done.dy is not ZERO:
            self._link(result, spelled, done)
        return result

    def _compute(self, spelled: Spelled) -> Computed:
        """An operation by its rule, on aliases of the primal values that users cannot change in place."""
        rule = RULES.get(spelled.function)
        args: list[Any] = []
        tangents: list[Any] = []
        originals: dict[int, Tensor] = {}

        def alias(x: Tensor) -> Tensor:
            copy = x.data
            originals[id(copy)] = x
            return copy

        for position, value in enumerate(spelled.args):
            if isinstance(value, Spelled):
                inner = self._compute(value)
                args.append(inner.y)
                tangents.append(inner.dy)
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
        return Computed(y, dy, args, tangents, originals)

    def _delivered(self, y: Any, dy: Any, originals: dict[int, Tensor], sources: list[Tensor], cut: bool) -> Any:
        """What the model gets: each result as an object of its own, or the very argument where it was handed through."""
        if isinstance(y, Tensor):
            if id(y) in originals:
                return originals[id(y)]
            result = y.data
            if not differentiable(y):
                dy = ZERO
            elif dy is not ZERO and dy.dtype != y.dtype:
                dy = dy.to(y)
            self._record(result, dy, sources, cut)
            return result
        if isinstance(y, (tuple, list)) and not isinstance(y, torch.Size):
            tangents = dy if isinstance(dy, (tuple, list)) else [ZERO] * len(y)
            pairs = zip(y, tangents, strict=True)
            entries = [self._delivered(*pair, originals, sources, cut) for pair in pairs]
            return type(y)(*entries) if hasattr(y, "_fields") else type(y)(entries)
        return y

    def _link(self, result: Tensor, spelled: Spelled, done: Computed) -> None:
        """Remember that a value ends in softmax or its like, possibly seen through views."""
        function, rest, kwargs = spelled.function, done.args[1:], spelled.kwargs
        if function in LINKS:
            self.links[result] = Link(lambda z: function(z, *rest, **kwargs), done.args[0], done.tangents[0])
        elif function in VIEWS and (inner := self.links.get(spelled.args[0])):
            self.links[result] = replace(inner, link=lambda z: function(inner.link(z), *rest, **kwargs))

    def leave_function(self, args: tuple, output: Any) -> Any:
        """A custom function that hands an input through returns it as another object."""
        for y in tensors_in(output):
            if not self.known(y):
                same = [x for x in tensors_in(args) if share_memory(x, y) and same_form(x, y)]
                for x in same[:1]:
                    self.table.record(y, self.tangent(x))
        return output

    # Outputs

    def finish(self, output: Any) -> None:
        """Raises TransformError with every problem of the run."""
        self.check_seen("the output", leaves(output))
        if self.problems:
            raise TransformError(list(dict.fromkeys(self.problems)))

    def tangents_of(self, output: Any) -> Any:
        """dy in the structure of the output: real zeros where nothing varies, None for leaves that are not float."""

        def of_leaf(leaf: Any) -> Any:
            dy = dense(self.tangent(leaf)) if isinstance(leaf, Tensor) else ZERO
            return zeros_tangent(leaf) if dy is ZERO else dy

        return mapped(of_leaf, output)

    def linearized(self, output: Any) -> Any:
        """y + dy, or link(z + dz) where the last function was softmax, log-softmax or sigmoid (paper, Eq. 3.13)."""

        def of_leaf(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if link := self.links.get(leaf):
                return link.link(link.z + link.dz)
            dy = dense(self.tangent(leaf))
            return leaf if dy is ZERO else leaf.data + dy

        return mapped(of_leaf, output)


def _is_about(call: Call, name: str) -> bool:
    if call.spelled is not None and call.spelled.function is getattr:
        return call.spelled.args[1] not in _VIEWED
    return name in _ABOUT
