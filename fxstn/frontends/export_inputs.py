"""The inputs of an exported program as placeholders of a graph, and what the graph requires of them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path

from fxstn.frontends.inputs import signature_of
from fxstn.ops.inputs import require_equal, require_guards, require_sizes


@dataclass
class GraphInputs:
    """Inputs of a graph.

    values: for each input of the program that is one of the forward's, the node of the graph.
    device_of: the node of the first tensor; device: where that was.
    """

    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    device_of: fx.Node | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the inputs: its value, and where it is.

    source: what guards of export call it.
    """

    placeholder: fx.Node
    source: str
    path: tuple[Any, ...]
    value: Any

    @property
    def steps(self) -> str:
        return "".join(map(str, self.path))


def bind_inputs(
    graph: fx.Graph, program: ExportedProgram, model: nn.Module, arguments: Mapping[str, Any]
) -> GraphInputs:
    """Append placeholders for the forward's own inputs, in their own structure, and what is required of them.

    arguments: the example inputs by the names of the forward.
    """
    leaves, inputs = _placeholders(graph, model, arguments)
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    by_name = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    guards, fixed, result = program._guards_code, set[str](), GraphInputs()
    for leaf, name in zip(leaves, names, strict=True):
        value: fx.Node = leaf.placeholder
        node = by_name[name]
        for key in leaf.path:
            value = graph.call_function(*_step(key, value))
        result.values[node] = value
        label = f"input '{leaf.placeholder.name}{leaf.steps}'"
        if not isinstance(leaf.value, Tensor):
            graph.call_function(require_equal, (value, leaf.value, label))
            continue
        shape = leaf.value.shape
        texts = [f"{leaf.source}{leaf.steps}.size()[{i}] == {size}" for i, size in enumerate(shape)]
        fixed |= {text for text in texts if text in guards}
        symbols = zip(texts, shape, node.meta["val"].shape, strict=True)
        sizes = tuple(size if isinstance(s, int) or text in guards else None for text, size, s in symbols)
        graph.call_function(require_sizes, (value, sizes, label))
        if result.device_of is None:
            result.device_of, result.device = value, leaf.value.device
    if conditions := tuple(guard for guard in guards if guard not in fixed):
        graph.call_function(require_guards, (conditions, inputs))
    return result


def _placeholders(
    graph: fx.Graph, model: nn.Module, arguments: Mapping[str, Any]
) -> tuple[list[_Leaf], dict[str, Any]]:
    """The leaves of the inputs, and the placeholders as the forward gets them: by name, those of **kwargs in a dict."""
    parameters = signature_of(model).parameters
    extra = next((p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    leaves, inputs = list[_Leaf](), dict[str, Any]()
    for name, value in arguments.items():
        parameter = parameters.get(name)  # None for what **kwargs takes
        if parameter is None:
            node = graph.create_node("placeholder", name, (), name=name)
            inputs.setdefault(extra, {})[name] = node
            source = f"L['{extra}']['{name}']"
        else:
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            default = () if parameter.default is parameter.empty else (parameter.default,)
            inputs[name] = node = graph.create_node("placeholder", star + name, default, name=name)
            source = f"L['{name}']"
        leaves += [_Leaf(node, source, path, leaf) for path, leaf in tree_flatten_with_path(value)[0]]
    return leaves, inputs


def _step(key: object, value: fx.Node) -> tuple[Callable[..., Any], tuple]:
    """The operation that takes one step into a structure of inputs."""
    if isinstance(key, GetAttrKey):
        return getattr, (value, key.name)
    if isinstance(key, SequenceKey):
        return operator.getitem, (value, key.idx)
    assert isinstance(key, MappingKey)
    return operator.getitem, (value, key.key)
