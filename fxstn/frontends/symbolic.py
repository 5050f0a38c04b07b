"""The frontend "fx": symbolic tracing. nn.Module → fx graph, in train or in eval mode, parameters shared."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn
from torch.fx.node import Argument, Target
from torch.nn.modules.batchnorm import _BatchNorm

from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.guards import HOOKS, TENSOR_HOOKS, ProblemCollector, UnsupportedError, guarded_capture
from fxstn.frontends.inputs import Inputs, InputSpec, arguments_of
from fxstn.frontends.interface import GraphFrontend
from fxstn.frontends.original import forward_of
from fxstn.frontends.outputs import plain_output
from fxstn.frontends.strict_mode import StrictMode, proxies_in
from fxstn.ir.containers import mapped
from fxstn.ir.graphs import assemble, complete_defaults
from fxstn.ir.node_info import ModuleCall, annotate, info_of
from fxstn.ir.output_types import OutputTypes
from fxstn.ir.vocabulary import is_opaque
from fxstn.rules import RULES


class _Results(tuple):
    """Several results of a function under `fx.wrap`. fx marks the node of the one result that it expects."""

    @property
    def node(self) -> SimpleNamespace:
        return SimpleNamespace(meta={})


def _as_result(value: object) -> fx.Proxy | _Results:
    """What a function under `fx.wrap` returned. Raises TypeError for what no node can stand for."""
    if isinstance(value, fx.Proxy):
        return value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return _Results(value)
    raise TypeError(f"a {type(value).__name__} cannot stand for the result of a function in a graph")


class _Proxy(fx.Proxy):
    """fx traces `y += 1` as y + 1 for want of __iadd__, and another name of y would miss the change."""

    def __setitem__(self, index: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(torch.Tensor, name):
            what = f"the forward assigns .{name} of a tensor, which a traced graph would lose,"
            raise UnsupportedError(
                cast(_Tracer, self.tracer).path_of_current(), what, "compute another tensor in its place"
            )
        super().__setattr__(name, value)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces through every module except batch norm, whose bookkeeping Python cannot be followed symbolically.

    supplied: the example inputs by name; None for no examples.

    Nodes know their scope and exits (`fxstn.ir.node_info`).
    """

    record_stack_traces = True

    def __init__(self, supplied: Mapping[str, object] | None) -> None:
        super().__init__()
        self.unsupported = ProblemCollector(self.path_of_current)
        self.calls: list[ModuleCall] = []
        self.number_of_calls = 0
        self.regions: list[str] = []
        self.supplied = supplied
        self.own: dict[int, str] = {}
        self.grad_enabled = torch.is_grad_enabled()
        self.output_types: OutputTypes | None = None

    def create_args_for_root(
        self, root_fn: Callable[..., object], is_module: bool, concrete_args: dict[str, Any] | tuple | None = None
    ) -> tuple[Callable[..., object], list[object]]:
        """Inputs with a constant default keep it, unless example inputs supply them: `if mask is None` can be followed."""
        function, arguments = super().create_args_for_root(forward_of(self.root), is_module, concrete_args)
        for i, argument in enumerate(arguments):
            if isinstance(argument, fx.Proxy) and (constant := self._constants(argument.node)):
                arguments[i] = constant[0]
                self.graph.erase_node(argument.node)
        complete_defaults(self.graph)

        def returned(*inputs: object) -> object:
            output, self.output_types = plain_output(function(*inputs))
            return output

        return returned, arguments

    def _constants(self, placeholder: fx.Node) -> tuple:
        """What the forward gets in place of a placeholder, in a tuple; () where the placeholder stays.

        An input that has a default, and that the examples do not supply or supply as None, is that default.
        """
        name, supplied = str(placeholder.target), self.supplied
        if name.startswith("**"):
            parameters = inspect.signature(forward_of(self.root)).parameters
            extra = [key for key in supplied or () if key not in parameters]
            return ({key: self.create_proxy("placeholder", key, (), {}) for key in extra},)
        if name.startswith("*"):
            return ((),) if supplied is not None and not supplied.get(name[1:]) else ()
        if not placeholder.args or isinstance(placeholder.args[0], torch.Tensor):
            return ()
        if supplied is None or name not in supplied:
            return placeholder.args
        return (None,) if supplied[name] is placeholder.args[0] is None else ()

    def create_arg(self, a: object) -> Argument:
        """fx would make a dataclass by an operation of the graph, which no rule knows."""
        if dataclasses.is_dataclass(a) and not isinstance(a, (type, dict)):
            what = f"the forward makes a {type(a).__name__}, which a graph cannot hold,"
            raise UnsupportedError(self.path_of_current(), what, "return tensors in tuples, lists or dicts")
        return super().create_arg(dict(a) if isinstance(a, dict) else a)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Target,
        args: tuple,
        kwargs: dict,
        name: str | None = None,
        type_expr: object = None,
        *rest: Callable[[fx.Node], fx.Proxy] | None,
    ) -> Any:
        """Looks into functions under `fx.wrap`, as far as symbolic values can go; otherwise such a call is one node."""
        if kind == "call_function" and target in DECOMPOSITIONS and target not in RULES:
            # One with a rule can stay a node, and canonicalize writes it out.
            return DECOMPOSITIONS[target](*args, **kwargs)
        if kind == "call_method" and target in TENSOR_HOOKS:
            return self.unsupported.add_tensor_hook()
        if callable(target) and is_opaque(target):
            last = next(iter(reversed(self.graph.nodes)))
            try:
                return _as_result(target(*args, **kwargs))
            except UnsupportedError:
                raise
            except Exception:  # whatever tracing it may raise: then it stays one node, as fx.wrap asks
                for node in reversed(list(self.graph.nodes)):
                    if node is last:
                        break
                    self.graph.erase_node(node)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, *rest)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, fx.Proxy]) -> object:
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
        return self.calls[-1].path if self.calls else ""

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple,
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        if torch.is_grad_enabled() != self.grad_enabled:
            self.unsupported.add(
                "a no_grad region, which a traced graph would lose,", "use .detach() in place of no_grad"
            )
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "output":
            annotate(node, types=self.output_types)
        annotate(node, scope=tuple(self.calls), full_precision=tuple(dict.fromkeys(self.regions)))
        return node

    def call_module(self, module: nn.Module, forward: Callable[..., object], args: tuple, kwargs: dict) -> Any:
        if module not in (self.submodule_paths or {}) and not list(module.parameters()):
            return forward(*args, **kwargs)  # the forward has made this module, a loss say
        path = self.path_of_module(module)
        if any(getattr(module, hooks) for hooks in HOOKS):
            self.unsupported.add("a hook, which a traced graph would lose,", "remove it before transform", path)
        self.number_of_calls += 1
        call = ModuleCall(self.number_of_calls, path, type(module))
        self.calls.append(call)  # stays there when the forward raises: the error names it
        output = super().call_module(module, forward, args, kwargs)
        entered = {id(proxy.node) for proxy in proxies_in((args, kwargs))}
        training = module.training if self.is_leaf_module(module, path) else None

        positions = itertools.count()

        def marked(value: Any) -> Any:
            position = next(positions)
            return self._exit_of(call, value, position, entered, training) if isinstance(value, fx.Proxy) else value

        output = mapped(marked, output, fx.Proxy)
        self.calls.pop()
        return output

    def _exit_of(
        self, call: ModuleCall, value: fx.Proxy, position: int, entered: set[int], training: bool | None
    ) -> fx.Proxy:
        """The value that leaves a module call, marked as such. A value that is handed through gets a node of its own."""
        if id(value.node) in entered:
            value = self.create_proxy("call_function", torch.clone, (value,), {})
            annotate(value.node, handed_through=True)
        info = info_of(value.node)
        annotate(value.node, exits=(*info.exits, call), positions={**info.positions, call.number: position})
        if training is not None:
            annotate(value.node, training=training)
        return value


@dataclass(frozen=True)
class Symbolic(GraphFrontend):
    """Follows a forward with symbolic values.

    examples: the inputs that callers pass. None: all without a default.
    """

    examples: InputSpec | None = None
    name: ClassVar[str] = "fx"
    needs_examples: ClassVar[bool] = False

    def capture(
        self, model: nn.Module, training: bool, frozen: Collection[str] = (), inputs: Inputs | None = None
    ) -> fx.GraphModule:
        """The forward in train or in eval mode.

        frozen: modules that stay in eval mode in the training graph.

        Inputs that have a constant default keep it, unless the examples supply them. Raises TransformError where the model's
        Python depends on data, or does something that a graph would drop or freeze without a word: hooks, regions
        without gradients or with autocast, custom autograd functions, random draws, attributes that the forward assigns.
        """
        tracer = _Tracer(arguments_of(model, self.examples.inputs) if self.examples else None)
        guard = guarded_capture(model, training, frozen, "symbolic tracing", tracer.unsupported, tracer.regions)
        with guard, StrictMode(model, tracer, tracer.path_of_current):
            graph = tracer.trace(model)
        return _under_root(model, graph)


def first_names(model: nn.Module) -> dict[int, str]:
    """{id of a parameter or buffer: the first of its names, as in named_parameters()}."""
    return {id(value): name for name, value in (*model.named_buffers(), *model.named_parameters())}


def _under_root(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Targets become "model.…", and a tied parameter keeps the first of its names."""
    first = first_names(model)
    for node in graph.nodes:
        # With this entry the generated code would call torch.fx.wrap for functions that the trace has looked into.
        node.meta.pop("is_wrapped", None)
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(model)
            node.target = f"model.{first.get(id(value), node.target)}"
        elif node.op == "call_module":
            node.target = f"model.{node.target}"
    root = nn.Module()
    root.model = model
    return assemble(root, graph)
