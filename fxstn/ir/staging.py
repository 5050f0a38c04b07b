"""The decorator `staged`: a staged function that is called with fx proxies becomes one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from fxstn.ir.closed import closed_call

P = ParamSpec("P")
R = TypeVar("R")
_KEY = "staging"


@dataclass(frozen=True)
class Staging:
    """How a staged helper is treated.

    random: it draws random numbers. Two calls are never merged, and its tangent is ZERO.
    overridable: function modes see it as one operation, as they see torch's.
    compiled: torch.compile looks into it. It cannot look into what waits for other processes; there a graph breaks.
    closed: torch.compile takes it as one operator, see `closed_call`: a loop over time, which it would unroll.
    derivative_of: the operation that the helper runs and differentiates; it draws and writes what that does.
    """

    random: bool = False
    overridable: bool = False
    compiled: bool = True
    closed: bool = False
    derivative_of: Callable[..., object] | None = None


def staging_of(function: object) -> Staging | None:
    """How a node's target is staged; None where it is no staged helper."""
    return getattr(function, _KEY, None)


def draws(function: object) -> bool:
    """Whether a node's target is a staged helper that draws random numbers."""
    staging = staging_of(function)
    return staging is not None and staging.random


_NO_PROXY = frozenset((Tensor, nn.Parameter, NoneType, bool, int, float, str))  # what most arguments of most steps are


def _proxy_in(values: Iterable[object]) -> fx.Proxy | None:
    for value in values:
        if type(value) in _NO_PROXY:
            continue
        if isinstance(value, fx.Proxy):
            return value
        if isinstance(value, (tuple, list)) and (proxy := _proxy_in(value)) is not None:
            return proxy
    return None


def _emit(proxy: fx.Proxy, function: Callable[..., object], args: tuple, kwargs: dict) -> Any:
    """One node that calls a function. Its proxy stands for the result, of whatever type that is."""
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)


def call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args, **kwargs), or one node that calls it when an argument is an fx.Proxy (methods included)."""
    proxy = _proxy_in((*args, *kwargs.values()))
    if proxy is None:
        return function(*args, **kwargs)
    return _emit(proxy, function, args, kwargs)


_in_graph: list[Callable[..., Any]] = []


def in_graph(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile puts the call of a function into its graph without looking into it.

    The function takes and returns tensors. It is run on stand-ins for tensors while a graph is compiled, so that it may read
    what autograd knows of them.
    """
    _in_graph.append(function)
    return function


def functions_in_graph() -> list[Callable[..., Any]]:
    """Those with the decorator `in_graph`."""
    return list(_in_graph)


@overload
def staged(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def staged(
    *,
    random: bool = ...,
    overridable: bool = ...,
    compiled: bool = ...,
    closed: bool = ...,
    derivative_of: Callable[..., object] | None = ...,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def staged(function: Callable[..., R] | None = None, /, **flags: bool | Callable[..., object] | None) -> object:
    """Decorator: the helper becomes a single call_function node whenever an argument is an fx.Proxy.

    flags: the fields of `Staging`, `@staged(random=True)` say.

    `torch.fx.wrap` only works while `symbolic_trace` patches the module; rules also run outside of it.
    """
    if function is None:
        return functools.partial(_staged, Staging(**flags))  # type: ignore[arg-type]
    return _staged(Staging(), function)


def _staged(staging: Staging, function: Callable[P, R]) -> Callable[P, R]:
    overridable, closed = staging.overridable, staging.closed

    def operator(*args: Any) -> Any:
        return closed_call(function, *args)

    if closed:
        in_graph(operator)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        proxy = _proxy_in(args)
        if proxy is None and kwargs:
            proxy = _proxy_in(kwargs.values())
        if proxy is not None:
            return _emit(proxy, wrapper, args, kwargs)
        if overridable and has_torch_function(args):
            return handle_torch_function(wrapper, args, *args, **kwargs)
        if closed and torch.compiler.is_dynamo_compiling():
            return operator(*args)
        return function(*args, **kwargs)

    vars(wrapper)[_KEY] = staging
    return wrapper


def _breaks(node: fx.Node) -> bool:
    staging = staging_of(node.target)
    return staging is not None and not staging.compiled


def with_breaks(module: fx.GraphModule) -> fx.GraphModule | None:
    """A graph in which torch.compile calls helpers that are not to be compiled as they are.

    Returns None where there is no such helper. Children are shared.
    """
    if not any(map(_breaks, module.graph.nodes)):
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in filter(_breaks, graph.nodes):
        node.target = torch.compiler.disable(node.target)
    return fx.GraphModule(module, graph)
