"""Pass 1, trace: nn.Module → fx graph, once for train mode and once for eval mode, parameters shared."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.errors import Problem, TransformError, innermost_user_frame
from fxstn.graphs import assemble

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Refused(Exception):
    """Something that a symbolic trace would silently drop."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(what)
        self.where, self.what, self.remedy = where, what, remedy


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Proxy(fx.Proxy):
    """fx traces `y += 1` as y + 1 for want of __iadd__, and another name of y would miss the change."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces through every module except batch norm, whose bookkeeping Python cannot be followed symbolically.

    Nodes carry: meta["scope"], the module calls they belong to as (call number, path, type), outermost first;
    meta["exits"], the module calls whose output they are, innermost first.
    """

    record_stack_traces = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, str, type]] = []
        self.number_of_calls = 0
        self.modes = _modes()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def path_of_current(self) -> str:
        return self.calls[-1][1] if self.calls else ""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            region = "a no_grad region" if torch.is_grad_enabled() != self.modes[0] else "an autocast region"
            raise _Refused(
                self.path_of_current(),
                f"{region}, which a traced graph would lose,",
                "use .detach() in place of no_grad; put autocast around the training step",
            )
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = tuple(self.calls)
        return node

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(module)
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise _Refused(path, "a hook, which a traced graph would lose,", "remove it before transform")
        self.number_of_calls += 1
        call = (self.number_of_calls, path, type(module))
        self.calls.append(call)  # stays there when the forward raises: the error names it
        output = super().call_module(module, forward, args, kwargs)
        entered = {id(proxy.node) for proxy in _proxies((args, kwargs))}
        output = map_aggregate(output, lambda value: self._mark_exit(value, call, entered, module))
        self.calls.pop()
        return output

    def _mark_exit(self, value: Any, call: tuple, entered: set[int], module: nn.Module) -> Any:
        if not isinstance(value, fx.Proxy):
            return value
        if id(value.node) in entered:  # handed through, as nn.Identity does: its output needs a node of its own
            value = self.create_proxy("call_function", torch.clone, (value,), {})
            value.node.meta["handed_through"] = True
        value.node.meta.setdefault("exits", []).append(call)
        if self.is_leaf_module(module, call[1]):
            value.node.meta["training"] = module.training
        return value


def _proxies(structure: Any) -> Iterator[fx.Proxy]:
    found: list[fx.Proxy] = []
    map_aggregate(structure, lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
    return iter(found)


@contextmanager
def _mode_of(model: nn.Module, training: bool, frozen: Collection[str]) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        for name, module in model.named_modules():
            if name in frozen:
                module.training = False
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def frozen_modules(model: nn.Module) -> set[str]:
    """Modules that stay in eval mode when the model trains: batch norms frozen by hand or by an overridden train()."""
    if model.training:
        return {name for name, module in model.named_modules() if not module.training}
    with _mode_of(model, True, ()):
        return {name for name, module in model.named_modules() if not module.training}


def trace(model: nn.Module, training: bool, frozen: Collection[str] = ()) -> fx.GraphModule:
    """Follow model.forward with symbolic values, in train or in eval mode; the model is left as it was.

    frozen: modules that stay in eval mode in the training graph. Raises TransformError where the model's Python depends
    on data, or holds something that a traced graph would drop without a word (hooks, no_grad and autocast regions,
    custom autograd functions).
    """
    tracer = _Tracer()

    def refuse_custom_function(cls: type, *args: Any, **kwargs: Any) -> Any:
        what = f"custom autograd function {cls.__name__}, whose backward a traced graph would lose,"
        raise _Refused(tracer.path_of_current(), what, "write it with torch operations")

    patch: Any = mock.patch.object(torch.autograd.Function, "apply", classmethod(refuse_custom_function))
    with _mode_of(model, training, frozen):
        try:
            if any(getattr(model, hooks) for hooks in _HOOKS):
                raise _Refused("", "a hook, which a traced graph would lose,", "remove it before transform")
            with patch:
                graph = tracer.trace(model)
        except _Refused as refused:
            source = innermost_user_frame(traceback.format_exc())
            problem = Problem(refused.where, refused.what, source, refused.remedy)
            raise TransformError([problem]) from None
        except Exception as error:
            source = innermost_user_frame(traceback.format_exc())
            what = f"symbolic tracing cannot follow the forward ({type(error).__name__}: {error})"
            remedy = "replace the branch or loop that depends on data or shapes there"
            raise TransformError([Problem(tracer.path_of_current(), what, source, remedy)]) from error
    return _under_root(model, graph)


def _under_root(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Targets become "model.…", and a tied parameter keeps the first of its names, as in named_parameters()."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    first = {id(value): name for name, value in named.items()}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(model)
            node.target = f"model.{first.get(id(value), node.target)}"
        elif node.op == "call_module":
            node.target = f"model.{node.target}"
    root = nn.Module()
    root.model = model
    return assemble(root, graph)
