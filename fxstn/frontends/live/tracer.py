"""Runs a model's own forward, whatever its Python does, and sees every operation and every module call of it."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.live.checkpoints import runs_again, without_checkpoints
from fxstn.frontends.live.containers import mapped, tensors_in
from fxstn.ir.errors import operation_name
from fxstn.ir.spelling import Spelled, Unspellable, respell
from fxstn.ir.vocabulary import ALPHA, DROPOUTS, SPATIAL, dropout_settings
from fxstn.ops.noise import alpha_dropout_coefficients, dropout_mask
from fxstn.ops.response import for_all_examples
from fxstn.rules import RULES

Address = tuple[str, str, int]  # module path, operation, which call of it within one call of the module
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_FOR_BACKWARD = {"retain_grad", "register_hook", "register_post_accumulate_grad_hook"}
_SWITCHES = {torch._C._set_grad_enabled}


@dataclass(frozen=True)
class Position:
    """λ[index], for the result of an operation or of a module, or for one element of it."""

    index: int
    element: int | None = None


@dataclass(frozen=True)
class Sites:
    """Where a run reads which λ: arguments and module exits that get a dropout; at operations, for each call of their
    module that was recorded, dropouts that are taken over and values that get one; last: of these calls, by module."""

    arguments: dict[str, int] = field(default_factory=dict)
    exits: dict[str, list[Position]] = field(default_factory=dict)
    taken: dict[Address, dict[int, Position]] = field(default_factory=dict)
    inserted: dict[Address, dict[int, Position]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def operations(self) -> set[str]:
        return {operation for _, operation, _ in (*self.taken, *self.inserted)}


@dataclass(eq=False)
class RunningCall:
    """One call of a module. occurrence: how many calls of that module came before it; counts: of operations so far."""

    number: int
    path: str
    kind: type
    occurrence: int = 0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Call:
    """One operation: as written, and as spelled (None: a mutation without a functional counterpart).

    order: how many of the same operation the innermost module call has carried out before.
    """

    original: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    spelled: Spelled | None
    order: int = 0

    @property
    def function(self) -> Callable[..., Any]:
        return self.spelled.function if self.spelled else self.original

    def run(self) -> Any:
        return self.original(*self.args, **self.kwargs)


def _never(*_: Any) -> bool:
    return False


@functools.cache
def inlined(function: types.FunctionType) -> Callable[..., Any] | None:
    """A copy of one of torch's Python functions that runs its body also while a mode is active; None for others.

    Such functions hand themselves to the active mode first, so that run inside of it they would come back for ever.
    """
    if not any(name in function.__code__.co_names and name in function.__globals__ for name in _CHECKS):
        return None
    names = {**function.__globals__, **dict.fromkeys(_CHECKS, _never)}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def argument_names(model: nn.Module, inputs: tuple) -> list[tuple[str, bool]]:
    """(name, whether it has a default) of each argument that is passed by position."""
    names: list[tuple[str, bool]] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [(f"{parameter.name}_{i}", False) for i in range(len(inputs) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append((parameter.name, parameter.default is not parameter.empty))
    return names


class Following(TorchFunctionMode):
    """Runs the original forward; dropout is drawn from explicit noise, at the strengths of λ where there is a site.

    Subclasses change `apply`. Functions of torch without a rule that are written in Python are followed into their body.
    strengths: (h,), constrained, or None without sites.
    """

    def __init__(self, model: nn.Module, sites: Sites | None = None, strengths: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.sites, self.strengths = model, sites or Sites(), strengths
        self.paths = {module: name for name, module in model.named_modules()}
        self.calls = [RunningCall(0, "", type(model))]
        self.occurrences: Counter[str] = Counter()
        self.number_of_calls = 0
        self.counted: set[str] | None = self.sites.operations()  # None: all of them
        self.inside_function = False  # of a custom autograd function, where torch disables grad mode

    # Module calls

    def run(self, inputs: tuple, named: dict[str, Any]) -> Any:
        """The model's output."""
        given = list(inputs)
        for i, (name, _) in enumerate(argument_names(self.model, inputs)[: len(inputs)]):
            if name in self.sites.arguments:
                index = self.sites.arguments[name]
                given[i] = mapped(lambda leaf, index=index: self.dropped(leaf, index), given[i])  # type: ignore[misc]
        with self.following():
            return self.model(*given, **named)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, every torch operation and every call of the model's modules is seen."""
        function = torch.autograd.Function.__dict__["apply"]

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if _get_current_function_mode() is not self:
                return function.__get__(None, cls)(*args, **kwargs)
            if runs_again(cls):
                run, _, *inputs = args
                return run(*inputs)
            before, self.inside_function = self.inside_function, not self.disabled()
            try:
                output = function.__get__(None, cls)(*args, **kwargs)
                with torch._C.DisableTorchFunction():
                    return self.leave_function(args, output)
            finally:
                self.inside_function = before

        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)), without_checkpoints(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def disabled(self) -> bool:
        """Whether the model itself switched gradients off here."""
        return not (torch.is_grad_enabled() or self.inside_function)

    @property
    def path(self) -> str:
        """Path of the innermost module that is being called."""
        return self.calls[-1].path

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        path = self.paths.get(module)
        if path is None:
            return
        self.number_of_calls += 1
        call = RunningCall(self.number_of_calls, path, type(module), self.occurrences[path])
        self.occurrences[path] += 1
        self.calls.append(call)
        with torch._C.DisableTorchFunction():
            self.enter(call, inputs)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if module not in self.paths:
            return output
        while len(self.calls) > 1:
            call = self.calls.pop()
            if call.path == self.paths[module]:
                break
        with torch._C.DisableTorchFunction():
            self.leave(call, output)
            for place in self.sites.exits.get(call.path, ()):
                output = self._dropped_leaves(output, place)
            return output

    def _dropped_leaves(self, output: Any, place: Position) -> Any:
        """A module's output with a dropout after one of its leaves, or after all of them."""
        position = itertools.count()

        def leaf(value: Any) -> Any:
            chosen = place.element in (None, next(position))
            return self.dropped(value, place.index) if chosen else value

        return mapped(leaf, output)

    def enter(self, call: RunningCall, inputs: Any) -> None:
        """A call of one of the model's modules begins."""

    def leave(self, call: RunningCall, output: Any) -> None:
        """It ends, with this output."""

    def leave_function(self, args: tuple, output: Any) -> Any:
        """A custom autograd function returns this output."""
        return output

    def made(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that come from outside of the model's forward: its inputs, noise."""

    # Operations

    def __torch_function__(self, original: Any, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if original in _SWITCHES:
            return original(*args, **kwargs)
        if getattr(original, "__name__", "") in _FOR_BACKWARD:
            return original(*args, **kwargs) if args[0].requires_grad else RemovableHandle(OrderedDict())
        try:
            call = Call(original, args, kwargs, respell(original, args, kwargs))
        except Unspellable:
            call = Call(original, args, kwargs, None)
        dropout = call.function in DROPOUTS
        body = None if dropout else self._body(call)
        if body is not None:
            with self:
                result = body(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = operation_name(call.function)
        if not dropout and self.counted is not None and name not in self.counted:
            return self.apply(call)
        call = replace(call, order=self.calls[-1].counts[name])
        self.calls[-1].counts[name] += 1
        taken = self._find(self.sites.taken, call, name)
        result = self.drop(call, taken.index if taken else None) if dropout else self.apply(call)
        inserted = self._find(self.sites.inserted, call, name)
        if inserted is None:
            return result
        if inserted.element is None:
            return self.dropped(result, inserted.index)
        entries = list(result)
        entries[inserted.element] = self.dropped(entries[inserted.element], inserted.index)
        return tuple(entries)

    def _body(self, call: Call) -> Callable[..., Any] | None:
        """What to run in place of an operation that is followed into its parts."""
        spelled = call.spelled
        if spelled is not None and spelled.function in DECOMPOSITIONS:
            return lambda *_, **__: DECOMPOSITIONS[spelled.function](*spelled.args, **spelled.kwargs)
        if isinstance(call.original, types.FunctionType) and call.function not in RULES:
            return inlined(call.original)
        return None

    def _find(self, sites: Mapping[Address, Mapping[int, Position]], call: Call, name: str) -> Position | None:
        """Which λ is read here. A module called more often than it was when recorded goes on as in its last call."""
        places = sites.get((self.path, name, call.order))
        if places is None:
            return None
        return places.get(min(self.calls[-1].occurrence, self.sites.last[self.path]))

    def apply(self, call: Call) -> Any:
        """Carry out one operation."""
        return call.run()

    def note(self, operation: str, kind: str, strength: float | int | None = None) -> None:
        """Something that explain lists: an operation by its kind of rule, or a dropout by λ's index or its own rate."""

    # Dropout

    def strength(self, index: int) -> Tensor:
        assert self.strengths is not None
        return for_all_examples(self.strengths[..., index], 0, f"dropout in module '{self.path}'")

    def dropped(self, x: Any, index: int) -> Any:
        """A value with a dropout inserted after it; unchanged when it is not a float tensor."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        self.note("dropout", "dropout", index)
        return self._multiplied(x, (dropout_mask(x, self.strength(index)), None), in_place=False)

    def drop(self, call: Call, index: int | None) -> Any:
        """A dropout of the model's own, at its own rate or, given an index, at λ[index]."""
        assert call.spelled is not None
        x = call.spelled.args[0]
        p, training = dropout_settings(call.spelled)
        if not training:
            return x
        self.note("dropout", "dropout", float(p) if index is None else index)
        strength = p if index is None else self.strength(index)
        draw: Any = alpha_dropout_coefficients if call.function in ALPHA else dropout_mask
        drawn = draw(x, strength, SPATIAL.get(call.function, 0))
        return self._multiplied(x, drawn if isinstance(drawn, tuple) else (drawn, None), call.spelled.in_place)

    def _multiplied(self, x: Tensor, noise: tuple[Any, Any], in_place: bool) -> Any:
        multiplier, shift = noise
        self.made(tensors_in(noise))
        result = self.apply(arithmetic(operator.mul, x, multiplier, in_place))
        return result if shift is None else self.apply(arithmetic(operator.add, result, shift, in_place))


def arithmetic(function: Callable[..., Any], x: Tensor, other: Any, in_place: bool) -> Call:
    """x · other or x + other as an operation of the model."""
    original = {operator.mul: operator.imul, operator.add: operator.iadd}[function] if in_place else function
    return Call(original, (x, other), {}, Spelled(function, (x, other), {}, in_place))
