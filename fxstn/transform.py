"""fxstn.transform: the list of passes, on one screen. Read this first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxstn.canonicalize import canonicalize
from fxstn.condition import Binding, bind, condition
from fxstn.errors import Problem, TransformError
from fxstn.hp import HyperparameterSpace, Spec
from fxstn.hyperize import hyperize, response_modules, responses
from fxstn.live.emit import addresses
from fxstn.live.emit import emit as emit_live
from fxstn.live.tape import record
from fxstn.network import METHODS, SelfTuningNetwork
from fxstn.pushforward import linearized, perturbed, pushforward, trained
from fxstn.simplify import simplify
from fxstn.trace import frozen_modules
from fxstn.trace import trace as trace_module

RUNGS = ("fx", "live")  # in the order that "auto" tries them
# Each graph is made from the conditioned training graph or the evaluation graph by one last pass.
LAST_PASS: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "pushforward": pushforward,
    "linearized": linearized,
    "perturbed": perturbed,
    "trained": trained,
}


def followed(model: nn.Module, training: bool, frozen: Collection[str], supplied: int = 0) -> fx.GraphModule:
    """trace → canonicalize."""
    return canonicalize(trace_module(model, training, frozen, supplied))


def inputs_supplied(example_inputs: Any) -> int:
    """How many inputs callers pass, as far as the examples tell: a tuple of them, one, or none."""
    return len(example_inputs) if isinstance(example_inputs, tuple) else int(example_inputs is not None)


def emit(
    root: nn.Module, binding: Binding, frozen: Collection[str], supplied: int, name: str, traced: Any = None
) -> fx.GraphModule:
    """Build one graph by name: "train", "eval", "trained", or "pushforward", "linearized", "perturbed", also with "_eval".

    root holds the children model, response and hparams; traced is the result of `followed` where it is at hand. The
    passes, in order: trace → canonicalize → condition → hyperize → pushforward (or one of its siblings) → simplify.
    """
    evaluating = name.endswith("eval")
    graph = traced or followed(root.get_submodule("model"), not evaluating, frozen, supplied)
    for child in ("hparams", "response"):
        graph.add_module(child, root.get_submodule(child))
    graph = condition(graph, () if evaluating else binding.sites)
    kind = name.removesuffix("_eval")
    if kind in LAST_PASS:
        names = [name.removesuffix(".R") for name, _ in graph.response.named_parameters() if name.endswith(".R")]  # type: ignore[union-attr, operator]
        graph = LAST_PASS[kind](hyperize(graph, names))
    return simplify(graph)


def transform(
    model: nn.Module,
    hparams: Sequence[Spec] | None = None,
    *,
    example_inputs: Any = None,
    method: str = "delta",
    trace: str = "auto",
) -> SelfTuningNetwork:
    """Compile a model into one that can tune its own regularisation while it trains (Bae & Grosse 2020).

    model: any module that symbolic tracing can follow; it is copied, not modified, and keeps its weights. hparams: a
    list of specs from `fxstn.hp`; None tunes every dropout found, starting at its own strength moved just inside the
    range, or, where the model has none, inserts dropout at the input and after each top-level stage but the last.
    example_inputs: a tensor or a tuple of them; when given, every graph is run once on it, so that whatever fails does
    so here. Inputs with a constant default (`mask=None`) keep it unless example_inputs supplies them. method: "delta"
    (Δ-STN: centred, separate objectives, linearised), "centered" (without linearisation) or "stn" (MacKay et al. 2019:
    uncentred, one objective). trace: how the forward is followed. "fx": symbolic tracing; "live": the forward runs as it is,
    whatever its Python does, with tangents carried beside it, and one perturbation for the whole batch; it needs
    example_inputs. "auto": the first that works; `rung` of the network tells which, `refusals` why not those before.

    Modules in eval mode while the model is in train mode (a frozen batch norm) stay frozen.

    Raises TransformError, with every problem at once, where the model cannot be followed; ValueError for a spec that
    matches nothing, a start outside its range, two hyperparameters of one name, nothing to tune, an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if trace not in ("auto", *RUNGS):
        raise ValueError(f"trace={trace!r} is not one of auto, {', '.join(RUNGS)}")
    if trace == "live" and example_inputs is None:
        raise ValueError("trace='live' runs the model once: give example_inputs")
    model = copy.deepcopy(model)
    frozen = tuple(sorted(frozen_modules(model)))
    rungs = (trace,) if trace != "auto" else RUNGS if example_inputs is not None else RUNGS[:1]
    problems: list[Problem] = []
    for rung in rungs:
        try:
            network = _climbed(rung, model, frozen, hparams, example_inputs, method)
            network.refusals = tuple(problems)
            return network
        except TransformError as error:
            problems += [replace(problem, rung=rung if len(rungs) > 1 else "") for problem in error.problems]
    raise TransformError(problems)


def _climbed(
    rung: str,
    model: nn.Module,
    frozen: Sequence[str],
    hparams: Sequence[Spec] | None,
    example_inputs: Any,
    method: str,
) -> SelfTuningNetwork:
    """A network by one way of following the forward. Raises as `transform`."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    supplied = inputs_supplied(example_inputs)
    if rung == "live":
        graphs = [record(model, training, frozen, inputs) for training in (True, False)]
    else:
        graphs = [followed(model, training, frozen, supplied) for training in (True, False)]
    binding = bind(graphs[0], hparams)
    space = HyperparameterSpace(binding.quantities)
    fan_ins, _ = responses(graphs)
    if not fan_ins:
        raise ValueError(
            "no parameter can respond to the hyperparameters: the model has no trainable linear or convolution layer "
            "whose parameters it uses directly; fxstn.explain(model) lists why"
        )
    reference = next(model.parameters())
    space.to(device=reference.device, dtype=reference.dtype)
    response = response_modules(model, fan_ins, len(space))
    if rung == "live":
        recipe: tuple[Any, ...] = (binding, frozen, addresses(graphs[0], binding))
        network = SelfTuningNetwork(model, response, space, binding.penalties, method, emit_live, recipe, rung)
    else:
        recipe = (binding, frozen, supplied)
        network = SelfTuningNetwork(model, response, space, binding.penalties, method, emit, recipe, rung)
        for name in ("train", "eval", "pushforward", "pushforward_eval"):
            network.keep(name, emit(network, binding, frozen, supplied, name, graphs[name.endswith("eval")]))
    if example_inputs is not None:
        network.check(*inputs)
    return network
