"""One operation of a running forward, one call of a module, and what an operation does with tensors."""

from __future__ import annotations

import functools
import operator
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxstn.frontends.inputs import Inputs, arguments_of, signature_of
from fxstn.ir.assignment import overwritten
from fxstn.ir.containers import tensors_in
from fxstn.ir.facts import is_seeded, returns_tensors, written_arguments
from fxstn.ir.spelling import Spelled
from fxstn.rules import RULES

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
# The schema of requires_grad_ says that it writes, and share_memory_ has no schema; both leave the values as they are.
_VALUES_UNCHANGED = {"requires_grad_", "share_memory_"}
# What zero_, fill_, copy_ and bernoulli_ put in place of a tensor: they read its form alone.
_FILLS = {torch.zeros_like, torch.full_like, overwritten, torch.bernoulli}


@dataclass(eq=False)
class RunningCall:
    """One call of a module.

    number: among all calls of a run.
    occurrence: how many calls of this module came before.
    counts: how often each operation was carried out in this call, calls of other modules inside it excepted.
    """

    number: int
    path: str
    kind: type
    occurrence: int = 0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Call:
    """One operation.

    original, args, kwargs: as the forward writes it.
    spelled: in the canonical spelling; None for a mutation without a functional counterpart.
    order: how often the innermost module call has carried out the same operation before.
    """

    original: Callable[..., object]
    args: tuple
    kwargs: dict[str, object]
    spelled: Spelled | None
    order: int = 0

    @property
    def function(self) -> Callable[..., object]:
        return self.spelled.function if self.spelled else self.original

    @property
    def name(self) -> str:
        """Name of the function as the forward writes it."""
        return getattr(self.original, "__name__", "")

    def run(self) -> object:
        return self.original(*self.args, **self.kwargs)


@dataclass(frozen=True)
class OperationNote:
    """An operation in a module.

    kind: of its rule; "draw" for random numbers; "random" for an operation that a spec could take over.
    strengths: of the last kind, indices into λ (int) or numbers of its own (float).
    """

    module: str
    operation: str
    kind: str
    strengths: tuple[float | int, ...] = ()


def arithmetic(function: Callable[..., object], x: Tensor, other: Tensor | float, in_place: bool) -> Call:
    """x · other or x + other as an operation of the model.

    function: operator.mul or operator.add.
    """
    in_place_form = {operator.mul: operator.imul, operator.add: operator.iadd}
    original = in_place_form[function] if in_place else function
    return Call(original, (x, other), {}, Spelled(function, (x, other), {}, in_place))


def mutated(call: Call) -> list[Tensor]:
    """The tensors that an operation writes into."""
    if call.kwargs.get("out") is not None:
        return list(tensors_in(call.kwargs["out"]))
    if call.spelled is not None and call.spelled.in_place:  # inplace=True included, which no schema knows
        return list(tensors_in(call.args[:1]))
    if call.name in _VALUES_UNCHANGED:
        return []
    arguments = written_arguments(call.original)
    if arguments or call.spelled is not None:
        by_position = [call.args[i] for i, _ in arguments if i < len(call.args)]
        return list(tensors_in([*by_position, *(call.kwargs[name] for _, name in arguments if name in call.kwargs)]))
    return list(tensors_in(call.args[:1]))  # assigning a property, x.data = y, has no schema


def is_draw(call: Call) -> bool:
    """Whether an operation fills a tensor with random numbers, normal_ say: what was in it does not matter."""
    return call.spelled is None and is_seeded(call.original)


def overwrites(call: Call) -> bool:
    """Whether an operation fills a tensor in place with other values: only its form matters."""
    fills = call.spelled is not None and call.spelled.in_place and call.spelled.function in _FILLS
    return fills or is_draw(call)


def may_return_no_tensor(call: Call) -> bool:
    """Whether an operation may only say something about a tensor. Its result has to be looked at where torch has no schema."""
    known = returns_tensors(call.original)
    # Methods and properties written in C, such as Tensor.type and Tensor.shape.
    of_tensor = isinstance(call.original, (types.MethodDescriptorType, types.MethodWrapperType))
    return known is False or (known is None and (of_tensor or call.function not in RULES))


DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


def _never(*_: object) -> bool:
    return False


@functools.cache
def inlined(function: types.FunctionType) -> Callable[..., object] | None:
    """A copy of one of torch's Python functions that runs its body also while a mode is active; None for others.

    What takes derivatives is one operation.

    Such a function hands itself to the active mode first, so that run inside of the mode it would come back for ever.
    """
    checks = any(name in function.__code__.co_names and name in function.__globals__ for name in _CHECKS)
    if not checks or function in DERIVATIVES:
        return None
    names = {**function.__globals__, **dict.fromkeys(_CHECKS, _never)}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def named_values(model: nn.Module, inputs: Inputs) -> list[tuple[str, bool, object]]:
    """(name, whether it may be left out, value) of each argument of a call."""
    parameters, result = signature_of(model).parameters, list[tuple[str, bool, object]]()
    for name, value in arguments_of(model, inputs).items():
        parameter = parameters.get(name)  # None for what **kwargs takes
        if parameter is not None and parameter.kind is parameter.VAR_POSITIONAL:
            assert isinstance(value, tuple)
            result += [(f"{name}_{i}", False, entry) for i, entry in enumerate(value)]
        else:
            result.append((name, parameter is None or parameter.default is not parameter.empty, value))
    return result
