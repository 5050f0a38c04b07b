"""Pass 1, trace: nn.Module → fx graph, once for train mode and once for eval mode, parameters shared."""

from __future__ import annotations

import copy
import operator
import pickle
import random
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxstn.decompositions import DECOMPOSITIONS
from fxstn.errors import Problem, TransformError, innermost_user_frame
from fxstn.graphs import assemble
from fxstn.layers.inputs import require_full_precision
from fxstn.rules.registry import is_opaque

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Refused(Exception):
    """Something that a symbolic trace would silently drop."""

    def __init__(self, where: str, what: str, remedy: str, source: str = "") -> None:
        super().__init__(what)
        self.where, self.what, self.remedy, self.source = where, what, remedy, source


class Losses:
    """What a graph would lose of a forward, found while it is followed; each once, with its line.

    place: the path of the module whose forward is running.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.place, self.problems = place, list[Problem]()

    def add(self, what: str, remedy: str, where: str | None = None) -> None:
        where = self.place() if where is None else where
        if all((problem.where, problem.what) != (where, what) for problem in self.problems):
            source = innermost_user_frame("".join(traceback.format_stack()))
            self.problems.append(Problem(where, what, source, remedy))


class _Results(tuple):
    """Several results of a function that fx was told not to follow; fx marks the node of its one result."""

    @property
    def node(self) -> SimpleNamespace:
        return SimpleNamespace(meta={})


def _as_result(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value
    if type(value) in (tuple, list):
        return _Results(value)
    raise TypeError(f"a {type(value).__name__} cannot stand for the result of a function in a graph")


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

    def __init__(self, supplied: int) -> None:
        super().__init__()
        self.losses = Losses(self.path_of_current)
        self.calls: list[tuple[int, str, type]] = []
        self.number_of_calls = 0
        self.supplied = supplied
        self.own: dict[int, str] = {}
        self.grad_enabled = torch.is_grad_enabled()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Inputs with a constant default keep it, unless example inputs supply them: `if mask is None` can be followed."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in enumerate(arguments):
            node = argument.node if isinstance(argument, fx.Proxy) else None
            if node is not None and node.args and i > self.supplied and not isinstance(node.args[0], torch.Tensor):
                arguments[i] = node.args[0]
                self.graph.erase_node(node)
        return function, arguments

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple, kwargs: dict, name: Any = None, type_expr: Any = None, *rest: Any
    ) -> Any:
        """Looks into functions that fx was told not to follow (`fx.wrap`), as far as they can be followed."""
        if kind == "call_function" and target in DECOMPOSITIONS:
            return DECOMPOSITIONS[target](*args, **kwargs)
        if kind == "call_function" and is_opaque(target):
            last = next(iter(reversed(self.graph.nodes)))
            try:
                return _as_result(target(*args, **kwargs))
            except Refused:
                raise
            except Exception:  # whatever tracing it may raise: then it stays one node, as fx was told
                for node in reversed(list(self.graph.nodes)):
                    if node is last:
                        break
                    self.graph.erase_node(node)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, *rest)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer becomes one node; fx would look for its name in the whole model at every reading."""
        if not self.own:
            registered = [*self.root.named_parameters(), *self.root.named_buffers()]
            self.own = {id(value): name for name, value in reversed(registered)}
        name = self.own.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def path_of_current(self) -> str:
        return self.calls[-1][1] if self.calls else ""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() != self.grad_enabled:
            self.losses.add("a no_grad region, which a traced graph would lose,", "use .detach() in place of no_grad")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = tuple(self.calls)
        return node

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(module)
        if any(getattr(module, hooks) for hooks in HOOKS):
            self.losses.add("a hook, which a traced graph would lose,", "remove it before transform", path)
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


class _Watch(TorchFunctionMode):
    """Sees what fx does not, calls without a symbolic argument: their results would become constants of the graph.

    Constants and random draws become nodes, made anew in each forward as the original makes them; values computed from
    the model's own tensors behind fx's back are refused.
    """

    def __init__(self, model: nn.Module, tracer: _Tracer) -> None:
        super().__init__()
        self.own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if next(_proxies((args, kwargs)), None) is not None:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _FACTORIES:
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        result = function(*args, **kwargs)
        reads = any(isinstance(a, torch.Tensor) and id(a) in self.own for a in tree_leaves((args, kwargs)))
        if reads and (name in _READS or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))):
            what = f"{name} of a parameter or buffer that is not read as an attribute, which would be frozen,"
            raise Refused(self.tracer.path_of_current(), what, "read it as self.name in the forward")
        return result


_FACTORIES = {"tensor", "as_tensor", "arange", "linspace", "logspace", "zeros", "ones", "full", "eye", "empty", "tril_indices",
              "triu_indices", "rand", "randn", "randint", "randperm"}  # fmt: skip
_READS = {"item", "tolist", "__bool__", "__float__", "__int__", "equal", "allclose"}


def module_state(model: nn.Module) -> dict[nn.Module, dict[str, tuple[Any, Any]]]:
    """Every attribute, parameter and buffer of every module: the value, and what it holds where that can change."""

    def held(value: Any) -> Any:
        return copy.copy(value) if type(value) in _CONTAINERS else value

    return {module: {name: (value, held(value)) for name, value in vars(module).items()} for module in model.modules()}


def restore(state: dict[nn.Module, dict[str, tuple[Any, Any]]]) -> list[str]:
    """Undo what a forward assigned; returns the names of the attributes that it changed."""
    changed = []
    for module, before in state.items():
        now = vars(module)
        for name in {*now, *before}:
            value, held = before.get(name, (_MISSING, _MISSING))
            if name in _REGISTERED:
                found = now[name]
                changed += [key for key in {*found, *held} if found.get(key, _MISSING) is not held.get(key, _MISSING)]
            elif not same(now.get(name, _MISSING), held):
                changed.append(name)
            if type(value) in _CONTAINERS and not same(value, held):
                value.clear()
                value.extend(held) if isinstance(value, list) else value.update(held)
            if value is _MISSING:
                del now[name]
            else:
                now[name] = value
    return changed


_MISSING = object()
_CONTAINERS = (list, dict, OrderedDict, set)
_REGISTERED = {"_parameters", "_buffers", "_modules"}


def same(a: Any, b: Any) -> bool:
    """The same object, or an equal plain value, or a container of the same; tensors and modules are never compared."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, (int, float, str, set)) and a == b


def _proxies(structure: Any) -> Iterator[fx.Proxy]:
    found: list[fx.Proxy] = []
    map_aggregate(structure, lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
    return iter(found)


@contextmanager
def mode_of(model: nn.Module, training: bool, frozen: Collection[str]) -> Iterator[None]:
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


def _generators() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(numpy.random.get_state()), bytes(torch.get_rng_state().numpy())


def frozen_modules(model: nn.Module) -> set[str]:
    """Modules that stay in eval mode when the model trains: batch norms frozen by hand or by an overridden train()."""
    if model.training:
        return {name for name, module in model.named_modules() if not module.training}
    with mode_of(model, True, ()):
        return {name for name, module in model.named_modules() if not module.training}


@contextmanager
def nothing_lost(
    model: nn.Module,
    training: bool,
    frozen: Collection[str],
    follower: str,
    place: Callable[[], str],
    full_precision: Callable[[], Any] = lambda: None,
    losses: Losses | None = None,
) -> Iterator[None]:
    """The model in one mode, for the time that something follows its forward; it is left as it was.

    Raises TransformError where the forward does something that a graph would drop or freeze without a word: hooks, autocast
    regions, custom autograd functions, random draws in Python, attributes that the forward assigns; and in place of whatever
    else is raised inside. follower: what follows, for messages; place: the path of the module whose forward is running;
    full_precision: called where a region without autocast begins. losses: found so far; what is found here is added, and
    the forward followed on, so that they are raised together.
    """
    losses = losses or Losses(place)
    enter_autocast = torch.autocast.__enter__

    def refuse_custom_function(cls: type, *args: Any, **kwargs: Any) -> Any:
        what = f"custom autograd function {cls.__name__}, whose backward a traced graph would lose,"
        losses.add(what, "write it with torch operations")
        alone = cls.setup_context is not torch.autograd.Function.setup_context  # type: ignore[attr-defined]
        return cls.forward(*([] if alone else [mock.MagicMock()]), *args, **kwargs)  # type: ignore[attr-defined]

    def refuse_autocast(region: Any) -> Any:
        if not region._enabled:
            full_precision()
            return enter_autocast(region)
        losses.add("an autocast region, which a traced graph would lose,", "put autocast around the training step")
        return enter_autocast(region)

    patches: list[Any] = [
        mock.patch.object(original, "forward", decomposition)
        for original, decomposition in DECOMPOSITIONS.items()
        if isinstance(original, type)
    ] + [
        mock.patch.object(torch.autograd.Function, "apply", classmethod(refuse_custom_function)),
        mock.patch.object(torch.autocast, "__enter__", refuse_autocast),
    ]
    with mode_of(model, training, frozen):
        before, draws = module_state(model), _generators()
        try:
            if any(getattr(model, hooks) for hooks in HOOKS):
                losses.add("a hook, which a traced graph would lose,", "remove it before transform", "")
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                yield
            if assigned := sorted(set(restore(before)) - {"_tensor_constants"}):
                what = f"the forward assigns {', '.join(map(repr, assigned))}, which a traced graph would lose,"
                remedy = "return the value, or keep it outside of the model"
                if assigned[0].startswith("_tensor_constant"):
                    what, remedy = "a tensor that is no attribute of the model", "register it as a buffer"
                raise Refused("", what, remedy)
            if _generators() != draws:
                what = "a random draw in Python, which a traced graph would freeze,"
                raise Refused("", what, "draw it with torch, from the input")
        except TransformError:
            raise
        except Exception as error:
            source = innermost_user_frame(traceback.format_exc())
            refused = _refusal(error)
            if refused is not None:
                problem = Problem(refused.where, refused.what, refused.source or source, refused.remedy)
                raise TransformError([*losses.problems, problem]) from None
            message = str(error).strip().partition("\n")[0]
            what = f"{follower} cannot follow the forward ({type(error).__name__}: {message})"
            remedy = "replace the branch or loop that depends on data or shapes there"
            raise TransformError([*losses.problems, Problem(place(), what, source, remedy)]) from error
        finally:
            restore(before)
        if losses.problems:
            raise TransformError(losses.problems)


def _refusal(error: BaseException | None) -> Refused | None:
    """The refusal that an exception is, or that it was raised from."""
    while error is not None and not isinstance(error, Refused):
        error = error.__cause__ or error.__context__
    return error


def trace(model: nn.Module, training: bool, frozen: Collection[str] = (), supplied: int = 0) -> fx.GraphModule:
    """Follow model.forward with symbolic values, in train or in eval mode; the model is left as it was.

    frozen: modules that stay in eval mode in the training graph. supplied: how many inputs callers pass; those beyond it
    that have a constant default keep it. Raises TransformError where the model's Python depends on data, or does something
    that a traced graph would drop or freeze without a word: hooks, no_grad and autocast regions, custom autograd
    functions, random draws, attributes that the forward assigns.
    """
    tracer = _Tracer(supplied)

    def full_precision() -> None:
        tracer.create_proxy("call_function", require_full_precision, (), {})

    place, losses = tracer.path_of_current, tracer.losses
    watched = nothing_lost(model, training, frozen, "symbolic tracing", place, full_precision, losses)
    with watched, _Watch(model, tracer):
        graph = tracer.trace(model)
    return _under_root(model, graph)


def first_names(model: nn.Module) -> dict[int, str]:
    """{id of a parameter or buffer: the first of its names, as in named_parameters()}."""
    return {id(value): name for name, value in (*model.named_buffers(), *model.named_parameters())}


def _under_root(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Targets become "model.…", and a tied parameter keeps the first of its names."""
    first = first_names(model)
    for node in graph.nodes:
        node.meta.pop(
            "is_wrapped", None
        )  # else generated code declares the result of a function looked into as wrapped
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(model)
            node.target = f"model.{first.get(id(value), node.target)}"
        elif node.op == "call_module":
            node.target = f"model.{node.target}"
    root = nn.Module()
    root.model = model
    return assemble(root, graph)
