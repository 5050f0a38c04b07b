"""Runtime helpers that can also be staged: called with fx proxies they become one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx
from torch.overrides import handle_torch_function, has_torch_function

F = TypeVar("F", bound=Callable[..., Any])


def _proxy_in(value: Any) -> fx.Proxy | None:
    if isinstance(value, fx.Proxy):
        return value
    if isinstance(value, (tuple, list)):
        return next((proxy for proxy in map(_proxy_in, value) if proxy is not None), None)
    return None


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), or one node that calls it when an argument is an fx.Proxy (methods included)."""
    proxy = _proxy_in((*args, *kwargs.values()))
    if proxy is None:
        return function(*args, **kwargs)
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)


def staged(function: F) -> F:
    """Make `function` stage itself as a single call_function node whenever an argument is an fx.Proxy.

    `torch.fx.wrap` only works while `symbolic_trace` patches the module; rules also run outside of it.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        proxy = _proxy_in((*args, *kwargs.values()))
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", wrapper, args, kwargs)

    wrapper.staged = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def derivative_of(function: Callable[..., Any], helper: F) -> F:
    """Mark a staged helper that runs `function` and differentiates it: it draws and writes whatever that does."""
    helper.primal = function  # type: ignore[attr-defined]
    return helper


def eager(function: F) -> F:
    """Mark a helper that torch.compile should call as it is, because it would unroll a loop: see `with_breaks`."""
    function.eager = True  # type: ignore[attr-defined]
    return function


def with_breaks(module: fx.GraphModule) -> fx.GraphModule | None:
    """A graph in which torch.compile calls helpers marked `eager` as they are, children shared; None where there is none."""
    if not any(getattr(node.target, "eager", False) for node in module.graph.nodes):
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if getattr(node.target, "eager", False):
            node.target = torch.compiler.disable(node.target)
    return fx.GraphModule(module, graph)


def operation(function: F) -> F:
    """A staged function that function modes see as one operation of its own, as they see torch's."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        proxy = _proxy_in((*args, *kwargs.values()))
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", wrapper, args, kwargs)
        if has_torch_function(args):
            return handle_torch_function(wrapper, args, *args, **kwargs)
        return function(*args, **kwargs)

    wrapper.staged = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]
