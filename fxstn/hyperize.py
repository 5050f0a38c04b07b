"""Pass 4, hyperize: trainable parameters of linear and convolution layers gain response parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxstn.errors import module_path, operation_name
from fxstn.graphs import add_placeholder, copied, model_of
from fxstn.layers.response import Response
from fxstn.rules import RULES

_ROLES = {1: "weight", 2: "bias"}


@dataclass(frozen=True)
class Reading:
    """One operation that reads a parameter: as 'weight' or 'bias' of a hyperlayer, or otherwise (role None)."""

    parameter: str
    role: str | None
    node: fx.Node


def readings(module: fx.GraphModule) -> list[Reading]:
    """Every reading of every parameter of the model in a canonical graph."""
    names = {f"model.{name}": name for name, _ in model_of(module).named_parameters()}
    found = []
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            for user in node.users:
                hyperlayer = user.op == "call_function" and user.target in RULES
                hyperlayer = hyperlayer and RULES[user.target].kind == "hyperlayer"
                positions = [i for i, argument in enumerate(user.args) if argument is node]
                role = _ROLES.get(positions[0]) if hyperlayer and len(positions) == 1 else None
                if role == "weight" and model_of(module).get_parameter(names[node.target]).dim() < 2:
                    role = None  # a vector has no rows to scale
                found.append(Reading(names[node.target], role, user))
    return found


def layer_weights(module: fx.GraphModule) -> list[str]:
    """Names of the parameters that are the weight of a linear or convolution operation, in execution order."""
    return list(dict.fromkeys(reading.parameter for reading in readings(module) if reading.role == "weight"))


def responses(graphs: Sequence[fx.GraphModule]) -> tuple[dict[str, int], dict[str, str]]:
    """Which parameters get a response: ({name: fan-in}, {name of one that gets none: why}).

    A parameter needs every operation that reads it, in every graph, to be a hyperlayer: all of them must see one Δw.
    """
    parameters = dict(model_of(graphs[0]).named_parameters())
    all_readings = [reading for graph in graphs for reading in readings(graph)]
    chosen: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for reading in all_readings:
        name = reading.parameter
        if not parameters[name].requires_grad:
            left_out[name] = "frozen (requires_grad=False)"
        elif reading.role is None:
            left_out[name] = f"read by {operation_name(reading.node.target)} in '{module_path(reading.node)}'"
        elif name not in chosen:
            weight = reading.node.args[1]
            owner = (
                str(weight.target).removeprefix("model.")
                if isinstance(weight, fx.Node) and weight.op == "get_attr"
                else name
            )
            chosen[name] = max(1, parameters.get(owner, parameters[name])[0].numel())
    return {name: fan_in for name, fan_in in chosen.items() if name not in left_out}, left_out


def response_modules(model: nn.Module, fan_ins: dict[str, int], hyperparameters: int) -> nn.Module:
    """A module tree that mirrors the model's parameter names: 'layer1.0.conv1.weight' → Response."""
    tree = nn.Module()
    for name, fan_in in fan_ins.items():
        *path, leaf = name.split(".")
        owner = tree
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, Response(model.get_parameter(name), fan_in, hyperparameters))
    return tree


def hyperize(module: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """Add the input `delta` and, beside each parameter in `names`, its row scales U δ and its response R.

    The parameter's node remembers both by name in meta["tangent"]; the pushforward pass reads them there.
    """
    module = copied(module)
    graph = module.graph
    delta = add_placeholder(graph, "delta")
    targets = {f"model.{name}": name for name in names}
    made: dict[str, tuple[str, str]] = {}
    for node in list(graph.nodes):
        name = targets.get(node.target) if node.op == "get_attr" else None
        if name is None:
            continue
        if name not in made:
            label, response = name.replace(".", "_"), f"response.{name}"
            with graph.inserting_before(node):
                scale = graph.create_node("call_module", response, (delta,), name=f"{label}_scale")
                value = graph.create_node("get_attr", f"{response}.R", name=f"{label}_response")
            made[name] = (scale.name, value.name)
        node.meta["tangent"] = made[name]
    graph.lint()
    module.recompile()
    return module
