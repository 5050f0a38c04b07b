"""What a forward is called with: by position or by name, as a user gives it and as a graph takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxstn.frontends.module_state import same
from fxstn.ops.precision import inexact

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
_SIGNATURES: WeakKeyDictionary[FunctionType, dict[bool, inspect.Signature]] = WeakKeyDictionary()
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Inputs(NamedTuple):
    """The arguments of one call, forward(*args, **kwargs)."""

    args: tuple
    kwargs: dict[str, Any]


def as_inputs(value: object, model: nn.Module) -> Inputs:
    """Inputs as users give them: a tuple by position, a mapping by name, anything else as the one input.

    A mapping of which no key names an input of the forward is one input, too: forward(batch) takes it as it is.
    """
    if isinstance(value, Inputs):
        return value
    if isinstance(value, tuple):
        return Inputs(value, {})
    if isinstance(value, Mapping) and _names_inputs(value, model):
        return Inputs((), dict(value))
    return Inputs((value,), {})


def _names_inputs(value: Mapping, model: nn.Module) -> bool:
    parameters = signature_of(model).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(value) and all(isinstance(key, str) for key in value) and (takes_any or not names.isdisjoint(value))


def signature_once(function: Callable[..., object]) -> inspect.Signature:
    """inspect.signature, which takes as long as ten small kernels: once for each function, and for its methods.

    Raises ValueError and TypeError as that does.
    """
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, FunctionType):
        return inspect.signature(function)
    known, is_method = _SIGNATURES.setdefault(plain, {}), plain is not function
    if is_method not in known:
        known[is_method] = inspect.signature(function)
    return known[is_method]


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the forward. A scripted one, which no frontend follows, has none: it takes anything."""
    try:
        return signature_once(model.forward)
    except ValueError:
        return inspect.signature(lambda *args, **kwargs: None)


def bound(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    """The inputs as arguments of the forward. Raises TypeError, with the names that it has, where it does not take them."""
    signature = signature_of(model)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise TypeError(
            f"the forward of {type(model).__name__} takes ({names}): {error}; give the inputs that it names"
        ) from None


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same call in one spelling: by position up to the first input that is left out, then by name, in the forward's order.

    Raises TypeError as `bound`.
    """
    call = bound(model, inputs)
    return Inputs(call.args, call.kwargs)


def arguments_of(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs by name. Those that *args takes are a tuple under its name, those that **kwargs takes have their own names.

    Raises TypeError as `bound`.
    """
    call = bound(model, inputs)
    extra = _extra_name(call.signature)
    return {name: value for name, value in call.arguments.items() if name != extra} | call.arguments.get(extra, {})


def _extra_name(signature: inspect.Signature) -> str:
    """The name of the parameter **kwargs; "" for none."""
    return next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")


def inputs_of_graph(targets: Iterable[str], model: nn.Module, inputs: Inputs) -> Inputs:
    """The same call for a graph of the model's forward.

    targets: of the graph's placeholders for inputs of the model. An input that has none is a constant of the graph.

    Raises TypeError for an input that differs from that constant, and as `bound`.
    """
    own = list(targets)
    if any(target.startswith("**") for target in own):  # the forward as it is
        return inputs
    parameters = signature_of(model).parameters
    by_position = [p.name for p in islice(parameters.values(), len(inputs.args)) if p.kind in _BY_POSITION]
    if not inputs.kwargs and own == by_position and len(own) == len(inputs.args):
        return inputs  # one value for each placeholder, as in most calls
    arguments = arguments_of(model, inputs)
    names = {target.lstrip("*") for target in own}
    unknown = [n for n, value in arguments.items() if n not in names and not same(value, _constant(parameters.get(n)))]
    if unknown:
        raise TypeError(
            f"the network was traced with the inputs ({', '.join(own)}) and got {', '.join(unknown)}, too; give transform "
            "example_inputs with all the inputs you pass"
        )
    missing = [name for name in names if name not in arguments and name not in parameters]
    if missing:
        raise TypeError(f"the network was traced with the inputs ({', '.join(own)}) and got no {', '.join(missing)}; give it, "
                        "or leave it out of example_inputs, too")  # fmt: skip
    args: list[object] = []
    for position, target in enumerate(own):
        if target.startswith("*"):
            args += arguments.get(target[1:], ())
        elif target in arguments:
            args.append(arguments[target])
        else:
            return Inputs(tuple(args), {name: arguments[name] for name in own[position:] if name in arguments})
    return Inputs(tuple(args), {})


def _constant(parameter: inspect.Parameter | None) -> object:
    """What a graph that has no placeholder for a parameter takes it for."""
    if parameter is None or parameter.default is parameter.empty:
        return () if parameter is not None and parameter.kind is parameter.VAR_POSITIONAL else None
    return parameter.default


@dataclass(frozen=True)
class InputSpec:
    """Example inputs without their values: enough to follow a model again after it was copied, moved or loaded.

    inputs: with tensors on the meta device, in the spelling of `in_order`.
    dtype: of the model's parameters at that time.
    """

    inputs: Inputs
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs | None) -> InputSpec | None:
        """Of inputs; None for none."""
        if inputs is None:
            return None
        dtype = next(filter(inexact, model.parameters()), torch.empty(0)).dtype
        return cls(tree_map_only(Tensor, lambda x: x.detach().to("meta"), in_order(model, inputs)), dtype)

    def like(self, model: nn.Module, exact: bool) -> list[Inputs]:
        """Inputs on the model's device, and in its dtype where they were so before; several guesses at which have a batch.

        exact: whether the batch keeps its size. Else it gets one that no other size has, so that the two are not confused.
        """
        parameter = next(filter(inexact, model.parameters()), torch.empty(0))
        leaves = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor) and leaf.dim()]
        batch = leaves[0].shape[0] if leaves else 0
        others = {size for leaf in leaves for i, size in enumerate(leaf.shape) if i or size != batch}
        other = next(size for size in _PRIMES if size not in others)

        def zeros(x: Tensor, size: int) -> Tensor:
            shape = [size if i == 0 and n == batch else n for i, n in enumerate(x.shape)]
            dtype = parameter.dtype if x.dtype == self.dtype else x.dtype
            return torch.zeros(shape, dtype=dtype, device=parameter.device)

        keep = exact or not (batch == 1 or batch in others)
        sizes = [batch] if keep else [other, *([batch] if batch > 1 else [])]
        return [Inputs(*tree_map_only(Tensor, partial(zeros, size=size), self.inputs)) for size in sizes]
