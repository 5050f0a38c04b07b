"""Builds the network of one frontend: capture, decide which λ belongs where and which weights respond, emit, check."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxstn.frontends.decompositions.layer_drop import loops_of
from fxstn.frontends.decompositions.torchvision import AUGMENTING
from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.inputs import Inputs, InputSpec, arguments_of, inputs_of_graph
from fxstn.frontends.interface import Frontend, Pass, Plan
from fxstn.frontends.meta_run import runs_on_meta
from fxstn.frontends.preservation import Preservation
from fxstn.frontends.region import unchanged
from fxstn.frontends.selection import errors_as_diagnostics
from fxstn.hp import HyperparameterSpace
from fxstn.ir.containers import tensors_in
from fxstn.ir.coverage import Coverage
from fxstn.ir.errors import NoResponseError, TransformError
from fxstn.ir.generators import forked_rng
from fxstn.ir.graph_kind import graph_kind
from fxstn.ir.graphs import model_of, own_inputs
from fxstn.network import SelfTuningNetwork
from fxstn.ops.precision import has_autocast, inexact, wide
from fxstn.passes.effects import may_write_parameters
from fxstn.passes.hyperize import Responses, response_modules, responses
from fxstn.passes.keep_precision import has_regions
from fxstn.passes.match import bind
from fxstn.passes.recipe import PipelineRecipe, canonical_graphs, with_children
from fxstn.passes.request import Request

_PUBLIC = ("train", "eval", "pushforward", "pushforward_eval")


def build_network(
    kind: type[Frontend], model: nn.Module, request: Request, pipelines: Mapping[str, Sequence[Pass]]
) -> SelfTuningNetwork:
    """The network of a model by one frontend.

    model: a copy that the network may keep.

    Raises TransformError where the frontend cannot follow the model, ValueError and TypeError for a mistake in the request.
    """
    frozen, inputs = tuple(sorted(frozen_modules(model))), request.inputs_of(model)
    frontend = kind(InputSpec.of(model, inputs))
    graphs = canonical_graphs(frontend, model, frozen, inputs)
    binding = bind(graphs[0], request.hparams, integer_inputs(model, inputs))
    frontend = frontend.bind(graphs, binding)
    space = HyperparameterSpace(binding.hyperparameters)
    constant = tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    plan = Plan(
        binding=binding, frozen=frozen, constant=constant, recompute=request.recompute, statistics=request.statistics
    )
    recipe = PipelineRecipe(frontend, plan, pipelines, request.hparams, loops_of(model))
    for layers_only in (False, True):
        responding = responding_parameters(graphs, request.structured, layers_only)
        parameters = list(filter(inexact, model.parameters()))
        widest = max((wide(p.dtype.to_real()) for p in parameters), key=lambda dtype: dtype.itemsize)
        space.to(device=parameters[0].device, dtype=widest)
        modules = response_modules(model, responding, len(space), request.structured)
        network = SelfTuningNetwork(model, modules, space, binding.terms, request.method, recipe)
        network.augments = augmentation(model) is not None or frontend.derivatives > 0
        network.coverage = Coverage.of(model, responding.axes, responding.obstacles)
        if frontend.rewritable:
            network.keep_canonical([with_children(graph, network) for graph in graphs])
        try:
            check(network, inputs)
        except TransformError:  # tangents of other parameters may reach an operation that has no rule
            if layers_only:
                raise
            continue
        break
    if inputs is not None and kind is not request.candidates[-1]:
        check_under_autocast(network, inputs)
    return network


def integer_inputs(model: nn.Module, inputs: Inputs | None) -> set[str]:
    """The names of the inputs that hold tensors, and none of floating point; none where there are no example inputs."""
    values = arguments_of(model, inputs) if inputs is not None else {}
    tensors = {name: list(tensors_in(value)) for name, value in values.items()}
    return {
        name for name, own in tensors.items() if own and not any(x.is_floating_point() or x.is_complex() for x in own)
    }


def responding_parameters(graphs: Sequence[Any], structured: bool, layers_only: bool) -> Responses:
    """Which parameters respond; see `responses`. Raises NoResponseError where none does, with what stands in the way."""
    responding = responses(graphs, structured, layers_only)
    if responding.axes:
        return responding
    parameters = sorted(model_of(graphs[0]).named_parameters(), key=lambda item: -item[1].numel())
    reasons = [f"'{name}': {responding.obstacles.get(name, 'read by no operation')}" for name, _ in parameters[:3]]
    more = f", and {len(parameters) - 3} more" if len(parameters) > 3 else ""
    why = f"the largest are {'; '.join(reasons)}{more}" if reasons else "the model has no parameters"
    raise NoResponseError(
        f"no parameter can respond to the hyperparameters, none moves the output as the weights of a layer do: {why}; "
        "fxstn.explain(model) lists why"
    )


def check(network: SelfTuningNetwork, inputs: Inputs | None) -> None:
    """Emit the public graphs, and run each on the example inputs, where there are any; the network is left as it was.

    The training graph, which the others compute more or less than, runs on the values, the others without values where that
    is enough.

    Raises TransformError where that fails.
    """
    delta = torch.zeros_like(network.hparams.unconstrained)
    model, rewritable = network.model, network.recipe.frontend.rewritable
    for name in _PUBLIC:
        with errors_as_diagnostics(f"the graph {name!r} of the forward"):
            graph = network.graph(name)
            if inputs is None:
                continue
            moved = {"delta": delta} if graph_kind(name).moves_weights else {}
            if name != "train" and isinstance(graph, fx.GraphModule):
                args, kwargs = inputs_of_graph(own_inputs(graph.graph), model, inputs)
                if runs_on_meta(graph, *args, **kwargs, **moved):
                    continue
            unwritten = model.parameters() if rewritable and not may_write_parameters(graph.graph) else ()
            with Preservation(model, inputs, but=unwritten) as stand_ins, forked_rng(), torch.no_grad():
                network.run(graph_kind(name), stand_ins, unchanged, **moved)


def check_under_autocast(network: SelfTuningNetwork, inputs: Inputs) -> None:
    """Run graphs with regions in which the model switches autocast off under autocast, where the model itself can be.

    Operations there take operands of one type, and a graph may have fixed types of values that autocast lowers.

    Raises TransformError where that fails.
    """
    model, device = network.model, network.hparams.unconstrained.device.type
    names = [name for name in ("train", "pushforward") if has_regions(network.graph(name))]
    if not names or not has_autocast(device):
        return
    delta = torch.zeros_like(network.hparams.unconstrained)
    with torch.autocast(device), forked_rng(), torch.no_grad():
        try:
            with Preservation(model, inputs) as own:
                model(*own.args, **own.kwargs)
        except Exception:  # whatever it raises: nobody trains it so
            return
        for name in names:
            moved = {"delta": delta} if graph_kind(name).moves_weights else {}
            what = f"the graph {name!r} of the forward, under autocast,"
            with errors_as_diagnostics(what), Preservation(model, inputs) as stand_ins:
                network.run(graph_kind(name), stand_ins, unchanged, **moved)


def augmentation(model: nn.Module, but: Collection[str] = ()) -> str | None:
    """Path of the first module that stays random in eval mode, as torchvision's transforms do; those at `but` excepted."""
    names = (name for name, module in model.named_modules() if type(module) in AUGMENTING)
    return next((name for name in names if name not in but), None)
