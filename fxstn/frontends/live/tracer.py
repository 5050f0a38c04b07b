"""Runs a model's own forward, whatever its Python does, and sees every operation and every module call of it."""

from __future__ import annotations

import itertools
import operator
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from fxstn.frontends.checkpoints import runs_again, without_checkpoints
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.layer_drop import no_layer_skipped
from fxstn.frontends.decompositions.torchvision import random_modules
from fxstn.frontends.inputs import Inputs, in_order
from fxstn.frontends.live.calls import Call, RunningCall, arithmetic, inlined, named_values
from fxstn.frontends.live.sites import Address, Position, RuntimeSites
from fxstn.hp import OPERATIONS
from fxstn.ir.containers import mapped, rebuilt, tensors_in
from fxstn.ir.errors import operation_name
from fxstn.ir.spelling import Unspellable, respell
from fxstn.ir.staging import staging_of
from fxstn.ir.tangents import BATCH_FIRST, Place
from fxstn.ir.vocabulary import ALPHA, DROPOUTS, SPATIAL, dropout_settings
from fxstn.ir.weighted_l1 import l1_keeps_weight
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask
from fxstn.ops.response import for_all_examples
from fxstn.rules import RULES

# These concern the backward pass alone; on a value without a gradient, which a primal value is, torch refuses them.
_FOR_BACKWARD = {"retain_grad", "register_hook", "register_post_accumulate_grad_hook"}
_SWITCHES = {torch._C._set_grad_enabled}


class LiveTracer(TorchFunctionMode):
    """Runs the original forward. Dropout is drawn from explicit noise, at the strengths of λ where there is a site.

    sites: where λ is read; None for nowhere.
    strengths: (h,), constrained; None without sites.

    Subclasses change `apply`. Functions of torch without a rule that are written in Python are followed into their body.
    """

    def __init__(self, model: nn.Module, sites: RuntimeSites | None = None, strengths: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.sites, self.strengths = model, sites or RuntimeSites(), strengths
        self.paths = {module: name for name, module in model.named_modules()}
        self.calls = [RunningCall(0, "", type(model))]
        self.occurrences: Counter[str] = Counter()
        self.number_of_calls = 0
        self.operations_to_count: set[str] | None = self.sites.operations()  # None: all of them
        self.inside_operation = False  # what a random operation of the model computes
        self.inside_function = False  # of a custom autograd function, where torch disables grad mode

    # Module calls

    def run(self, inputs: Inputs) -> object:
        """The model's output."""
        args, kwargs = in_order(self.model, inputs)
        if self.sites.arguments:
            names = [name for name, _, _ in named_values(self.model, inputs)]
            args = tuple(map(self._dropped_argument, names, args))  # positional ones come first
            kwargs = {name: self._dropped_argument(name, value) for name, value in kwargs.items()}
        with self.active():
            return self.model(*args, **kwargs)

    def _dropped_argument(self, name: str, value: object) -> object:
        """An input with a dropout after it, where there is a site."""
        index = self.sites.arguments.get(name)
        return value if index is None else self._dropped_leaves(value, Position((index,)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, every torch operation and every call of the model's modules is seen."""
        leave = register_module_forward_hook(self._leave, always_call=True)
        hooks = (register_module_forward_pre_hook(self._enter), leave)
        apply = classmethod(self._autograd_apply(torch.autograd.Function.__dict__["apply"]))
        try:
            with (
                mock.patch.object(torch.autograd.Function, "apply", apply),
                without_checkpoints(),
                random_modules(self.paths),
                no_layer_skipped(self.model),
                l1_keeps_weight(),
                self,
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _autograd_apply(self, original: classmethod) -> Callable[..., object]:
        """torch.autograd.Function.apply, after which `leave_function` is told of the output."""

        def apply(cls: type, *args: object, **kwargs: object) -> object:
            bound = original.__get__(None, cls)
            if _get_current_function_mode() is not self:
                return bound(*args, **kwargs)
            if runs_again(cls):
                run, _, *inputs = args
                return cast(Callable[..., object], run)(*inputs)
            before, self.inside_function = self.inside_function, not self.disabled()
            try:
                output = bound(*args, **kwargs)
                with torch._C.DisableTorchFunction():
                    return self.leave_function(args, output)
            finally:
                self.inside_function = before

        return apply

    def disabled(self) -> bool:
        """Whether the model itself has switched gradients off here."""
        return not (torch.is_grad_enabled() or self.inside_function)

    @property
    def path(self) -> str:
        """Path of the innermost module that is being called."""
        return self.calls[-1].path

    def _enter(self, module: nn.Module, inputs: object) -> None:
        path = self.paths.get(module)
        if path is None:
            return
        self.number_of_calls += 1
        call = RunningCall(self.number_of_calls, path, type(module), self.occurrences[path])
        self.occurrences[path] += 1
        self.calls.append(call)
        with torch._C.DisableTorchFunction():
            self.enter(call, inputs)

    def _leave(self, module: nn.Module, inputs: object, output: object) -> Any:
        if module not in self.paths:
            return output
        while len(self.calls) > 1:
            call = self.calls.pop()
            if call.path == self.paths[module]:
                break
        with torch._C.DisableTorchFunction():
            self.leave(call, output)
            for position in self.sites.exits.get(call.path, ()):
                output = self._dropped_leaves(output, position)
            return output

    def _dropped_leaves(self, output: object, position: Position) -> object:
        """A structure with a dropout after one of its leaves, or after all of them."""
        numbers = itertools.count()

        def leaf(value: object) -> object:
            chosen = position.element in (None, next(numbers))
            return self.insert_dropout(value, position.index) if chosen else value

        return mapped(leaf, output)

    def enter(self, call: RunningCall, inputs: object) -> None:
        """A call of one of the model's modules begins."""

    def leave(self, call: RunningCall, output: object) -> None:
        """It ends, with this output."""

    def leave_function(self, args: tuple, output: object) -> object:
        """A custom autograd function returns this output."""
        return output

    def add_constants(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that come from outside of the model's forward: its inputs, noise."""

    # Operations

    def __torch_function__(
        self, original: Callable[..., object], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if original in _SWITCHES:
            return original(*args, **kwargs)
        if getattr(original, "__name__", "") in _FOR_BACKWARD:
            return original(*args, **kwargs) if args[0].requires_grad else RemovableHandle(OrderedDict())
        try:
            call = Call(original, args, kwargs, respell(original, args, kwargs))
        except Unspellable:
            call = Call(original, args, kwargs, None)
        is_random = call.function in DROPOUTS or call.function in OPERATIONS
        body = None if is_random else self.body_of(call)
        if body is not None:
            with self:
                result = body(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = operation_name(call.function)
        if self.inside_operation:
            return self.apply(call)
        if not is_random and self.operations_to_count is not None and name not in self.operations_to_count:
            return self.apply(call)
        call = replace(call, order=self.calls[-1].counts[name])
        self.calls[-1].counts[name] += 1
        own = self._position(self.sites.own, call, name)
        if call.function in DROPOUTS:
            result = self.drop(call, own.index if own else None)
        elif is_random:
            result = self.operate(call, own.indices if own else None)
        else:
            result = self.apply(call)
        insertion = self._position(self.sites.insertions, call, name)
        return result if insertion is None else self._dropped_element(result, insertion)

    def body_of(self, call: Call) -> Callable[..., object] | None:
        """What to run in place of an operation that is followed into its parts."""
        spelled = call.spelled
        if spelled is not None and spelled.function in DECOMPOSITIONS:
            return lambda *_, **__: DECOMPOSITIONS[spelled.function](*spelled.args, **spelled.kwargs)
        if isinstance(call.original, types.FunctionType) and call.function not in RULES:
            return inlined(call.original)
        return None

    def _position(self, sites: Mapping[Address, Mapping[int, Position]], call: Call, operation: str) -> Position | None:
        """Which λ is read here. What is called more often than when it was recorded goes on as in its last call."""
        order = min(call.order, self.sites.orders.get((self.path, operation), call.order))
        positions = sites.get((self.path, operation, order))
        if positions is None:
            return None
        return positions.get(min(self.calls[-1].occurrence, self.sites.last[self.path]))

    def apply(self, call: Call) -> object:
        """Carry out one operation."""
        return call.run()

    def note(self, operation: str, kind: str, strengths: tuple[float | int, ...] = ()) -> None:
        """What explain lists, as an `OperationNote`."""

    def strength_of(self, index: int, x: object) -> tuple[Tensor, Place]:
        """λ[index] for an operation on x, and where x has the examples for a strength of each."""
        assert self.strengths is not None
        where = f"dropout in module '{self.path}'"
        return for_all_examples(self.strengths[..., index], 0, where), BATCH_FIRST

    def insert_dropout(self, x: object, index: int) -> object:
        """A value with a dropout after it; unchanged when it is not a float tensor."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        self.note("dropout", "random", (index,))
        strength, place = self.strength_of(index, x)
        return self._with_noise(x, dropout_mask(x, strength, 0, place), None, in_place=False)

    def _dropped_element(self, result: object, position: Position) -> object:
        """The result of an operation with a dropout after it, or after one of its elements."""
        if position.element is None:
            return self.insert_dropout(result, position.index)
        elements = list(cast(Sequence[object], result))
        elements[position.element] = self.insert_dropout(elements[position.element], position.index)
        return rebuilt(cast(tuple, result), elements)

    def drop(self, call: Call, index: int | None) -> object:
        """A dropout of the model's own, at its own rate or, given an index, at λ[index]."""
        assert call.spelled is not None
        x = call.spelled.args[0]
        p, training = dropout_settings(call.spelled)
        if not training:
            return x
        self.note("dropout", "random", (float(p) if index is None else index,))
        strength, place = (p, BATCH_FIRST) if index is None else self.strength_of(index, x)
        draw: Callable[..., Any] = alpha_dropout_coefficients if call.function in ALPHA else dropout_mask
        noise = draw(x, strength, SPATIAL.get(call.function, 0), place)
        multiplier, shift = noise if isinstance(noise, tuple) else (noise, None)
        return self._with_noise(x, multiplier, shift, call.spelled.in_place)

    def operate(self, call: Call, indices: tuple[int, ...] | None) -> object:
        """A random operation of the model's own, at its own strengths or at λ[indices]."""
        x, *strengths = call.args
        operation, settings = OPERATIONS[call.function], call.kwargs
        if indices is not None:
            strengths = [self.strength_of(index, x)[0] for index in indices]
        elif not any(strengths):
            return x
        self.note(operation.function.__name__, "random", tuple(map(float, strengths)) if indices is None else indices)
        with torch._C.DisableTorchFunction():
            drawn = operation.draw(x, *strengths, **settings)
        self.add_constants(tensors_in(drawn))
        self.inside_operation = True
        try:
            with self:
                return operation.apply(x, drawn, **(settings if staging_of(operation.apply) else {}))
        finally:
            self.inside_operation = False

    def _with_noise(self, x: Tensor, multiplier: Tensor | int, shift: Tensor | None, in_place: bool) -> object:
        """x · multiplier + shift, as operations of the model."""
        self.add_constants(tensors_in((multiplier, shift)))
        result = self.apply(arithmetic(operator.mul, x, multiplier, in_place))
        return result if shift is None else self.apply(arithmetic(operator.add, cast(Tensor, result), shift, in_place))
