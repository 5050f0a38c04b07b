"""A program of torch.export → the graph that symbolic tracing would make, under a root."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import Argument, map_aggregate
from torch.utils._pytree import tree_unflatten

from fxstn.frontends.export_inputs import bind_inputs
from fxstn.frontends.export_operations import RandomCall
from fxstn.frontends.guards import UnsupportedError
from fxstn.frontends.symbolic import first_names
from fxstn.ir.errors import source_of
from fxstn.ir.graphs import assemble, complete_defaults
from fxstn.ir.node_info import ModuleCall, annotate, info_of
from fxstn.ir.output_types import OutputTypes

aten = torch.ops.aten
_CHECKS = ("aten::_assert", "aten::sym_constrain")  # of what the guards and the inputs' sizes say already
_END = torch.iinfo(torch.int64).max
_STORAGE = ("pin_memory", "layout")  # filled in by export; a graph's tensors are strided
Scope = tuple[ModuleCall, ...]


def graph_of(
    program: ExportedProgram, model: nn.Module, arguments: Mapping[str, Any], types: OutputTypes | None,
    operations: Sequence[RandomCall],
) -> fx.GraphModule:  # fmt: skip
    """The program as a graph.

    arguments: the example inputs by the names of the forward.
    types: of an output whose leaves alone the program returns; None for plain containers.
    operations: the calls of random operations, by their number in the program.

    Parameters, buffers and constants become nodes where they are read, counted batches and batch norms one operation,
    no_grad regions detached results; regions without autocast are marked. Raises UnsupportedError for what the graph cannot
    express.
    """
    return _Rewriter(program, model, types, operations).run(arguments)


class _Rewriter:
    """Walks a program once.

    values: for each of its nodes the node of the new graph, or the number or list that it stands for.
    attributes: for inputs of the program that are attributes of the root, their names.
    """

    def __init__(
        self, program: ExportedProgram, model: nn.Module, types: OutputTypes | None, operations: Sequence[RandomCall]
    ) -> None:
        self.program, self.model, self.types, self.operations = program, model, types, operations
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.constants = nn.Module()
        self.root.model, self.root.constants = model, self.constants
        self.values: dict[fx.Node, Any] = {}
        self.attributes: dict[fx.Node, str] = {}
        self.attribute_nodes: dict[tuple[str, Scope], fx.Node] = {}
        self.calls: dict[str, ModuleCall] = {}
        self.tensors: list[fx.Node] = []
        self.regions: list[str | None] = []
        first = {module: name for name, module in model.named_modules()}
        self.paths = {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}

    def run(self, arguments: Mapping[str, Any]) -> fx.GraphModule:
        """The graph; see `graph_of`."""
        self._bind_attributes()
        inputs = bind_inputs(self.graph, self.program, self.model, arguments)
        self.values |= inputs.values
        self.device_of, self.device = inputs.device_of, inputs.device
        complete_defaults(self.graph)
        nodes = [node for node in self.program.graph.nodes if node.op != "placeholder"]
        for node in nodes:
            if node.op != "output":
                self._visit(node)
        self._output(nodes[-1].args[0])
        for node in self.tensors:
            self._mark_exits(node)
        self.graph.lint()
        return assemble(self.root, self.graph)

    def _bind_attributes(self) -> None:
        """Find the attribute for each input of the program that stands for one."""
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        first = first_names(self.model)
        for spec in self.program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                value = operator.attrgetter(str(spec.target))(self.model)
                self.attributes[node] = f"model.{first[id(value)]}"
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.attributes[node] = self._constant(str(spec.target), self.program.constants[str(spec.target)])
            elif spec.kind is not InputKind.USER_INPUT:
                what = f"an input of kind {spec.kind.name.lower()}, which a traced graph would lose,"
                raise UnsupportedError("", what, "keep tensors in parameters and buffers")

    def _constant(self, name: str, value: Tensor) -> str:
        """The attribute that holds a constant of the program: the model's own, or a new one of the root."""
        try:
            if operator.attrgetter(name)(self.model) is value:
                return f"model.{name}"
        except AttributeError:
            pass
        name = name.replace(".", "_")
        self.constants.register_buffer(name, value.detach().clone())
        return f"constants.{name}"

    # Operations

    def _visit(self, node: fx.Node) -> None:
        """Append what one node of the program, or of a region in it, computes."""
        target = node.target
        if node.op == "get_attr":
            value = operator.attrgetter(str(target))(node.graph.owning_module)
            if isinstance(value, Tensor):
                self.attributes[node] = self._constant(str(target), value)
            else:
                self.values[node] = value
        elif isinstance(target, HigherOrderOperator):
            self._inline(node)
        elif isinstance(target, OpOverload) and target._schema.name.startswith(_CHECKS):
            pass
        elif target is operator.getitem and isinstance(self.values.get(_source(node)), list):
            self.values[node] = self.values[_source(node)][node.args[1]]
        elif _does_nothing(node):
            self.values[node] = self._value(node.args[0], self._scope(node))
        else:
            self._emit(node)

    def _emit(self, node: fx.Node) -> None:
        """Append one operation."""
        scope = self._scope(node)
        target = node.target
        args, kwargs = self._value(node.args, scope), self._value(node.kwargs, scope)
        kwargs = {key: value for key, value in kwargs.items() if key not in _STORAGE}
        handed_through = target is aten.alias.default
        if handed_through:
            target = torch.clone
        elif target is torch.ops.fxstn.random_operation.default:
            target, strengths, kwargs = self.operations[args[1]]
            args = (args[0], *strengths)
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta = {"stack_trace": node.meta.get("stack_trace")}
        regions = tuple(dict.fromkeys(self.regions))
        annotate(new, scope=scope, handed_through=handed_through, full_precision=regions)
        self.values[node] = new
        if isinstance(node.meta.get("val"), Tensor):
            self.tensors.append(new)

    def _value(self, structure: Argument, scope: Scope) -> Any:
        """A structure of the program with its nodes, and the device of the inputs, replaced by nodes of the graph."""

        def leaf_value(leaf: Argument) -> Any:
            if isinstance(leaf, torch.device) and leaf == self.device:
                return self.graph.call_function(getattr, (self.device_of, "device"))
            if not isinstance(leaf, fx.Node):
                return leaf
            return self._attribute(self.attributes[leaf], scope) if leaf in self.attributes else self.values[leaf]

        return map_aggregate(structure, leaf_value)

    def _attribute(self, target: str, scope: Scope) -> fx.Node:
        """The node that reads an attribute in one module call."""
        if (target, scope) not in self.attribute_nodes:
            name = target.partition(".")[2].replace(".", "_")
            node = self.graph.create_node("get_attr", target, name=name)
            annotate(node, scope=scope)
            if target.startswith("constants."):
                device = self.graph.call_function(getattr, (self.device_of, "device"))
                node = self.graph.call_function(Tensor.to, (node, device))
                annotate(node, scope=scope)
            self.attribute_nodes[target, scope] = node
        return self.attribute_nodes[target, scope]

    def _inline(self, node: fx.Node) -> None:
        """A region of the forward that export has put into a graph of its own."""
        scope = self._scope(node)
        regions = torch.ops.higher_order
        if node.target is regions.wrap_with_autocast and not node.args[2]:
            first = 4
        elif node.target is regions.wrap_with_set_grad_enabled and not node.args[0]:
            first = 1
        else:
            what = f"{node.target}, a region that a traced graph would lose,"
            raise UnsupportedError(
                scope[-1][1] if scope else "", what, "write it with plain torch operations", source_of(node)
            )
        body: fx.GraphModule = self.values[_source(node, first)]
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        for i, inner in enumerate(inputs, first + 1):
            outer = _source(node, i)
            table = self.attributes if outer in self.attributes else self.values
            table[inner] = table[outer]
        self.regions += [self._type_of_device(node.args[0])] if first == 4 else []
        for inner in body.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                self._visit(inner)
        if first == 4:
            self.regions.pop()
        results = self._value(body.graph.output_node().args[0], scope)
        self.values[node] = [self._detached(value, scope) if first == 1 else value for value in results]

    def _type_of_device(self, name: Argument) -> str | None:
        """The type of device that a region names, as `NodeInfo.full_precision` has it: that of the inputs may change."""
        return None if self.device is not None and self.device.type == name else str(name)

    def _detached(self, value: Argument, scope: Scope) -> Argument:
        """A result of a region without gradients."""
        if not isinstance(value, fx.Node):
            return value
        node = self.graph.call_function(torch.detach, (value,))
        annotate(node, scope=scope)
        return node

    # Modules and outputs

    def _scope(self, node: fx.Node) -> Scope:
        """The module calls that a node belongs to, outermost first, the model's own left out."""
        scope = []
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path == "" or path == key:  # the model itself, or nothing
                continue
            if key not in self.calls:
                path = self.paths.get(path, path)
                kind = type(self.model.get_submodule(path)) if path in self.paths else nn.Module
                self.calls[key] = ModuleCall(len(self.calls) + 1, path, kind)
            scope.append(self.calls[key])
        return tuple(scope)

    def _mark_exits(self, node: fx.Node) -> None:
        """Which module calls a value leaves: those that some reader of it does not belong to, innermost first."""
        outside = [call for call in info_of(node).scope if any(call not in info_of(user).scope for user in node.users)]
        if outside:
            annotate(node, exits=tuple(outside[::-1]))

    def _output(self, flat: Argument) -> None:
        """Append the output, in the structure that the forward returns.

        flat: its leaves.
        """
        for spec in self.program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                what = f"the forward changes {spec.target!r}, which a traced graph would lose,"
                raise UnsupportedError("", what, "update it outside of the forward")
        node = self.graph.output(tree_unflatten(list(self._value(flat, ())), self.program.call_spec.out_spec))
        annotate(node, types=self.types)


def _source(node: fx.Node, position: int = 0) -> fx.Node:
    """An argument of a node that is a node itself."""
    argument = node.args[position]
    assert isinstance(argument, fx.Node)
    return argument


def _does_nothing(node: fx.Node) -> bool:
    """Slices of everything, and what export does to constants, which nothing changes by values."""
    if node.target is aten.slice.Tensor:
        defaults = (None, 0, 0, _END, 1)  # input, dim, start, end, step
        start, end, step = (*node.args, *defaults[len(node.args) :])[2:]
        return bool(start in (0, None) and end == _END and step == 1)
    constant = aten.lift_fresh_copy.default
    return node.target is constant or (node.target is aten.detach_.default and _source(node).target is constant)
