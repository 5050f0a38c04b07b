"""fxstn.transform: the list of passes, on one screen. Read this first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxstn.canonicalize import canonicalize
from fxstn.condition import Binding, bind, condition
from fxstn.errors import Problem, TransformError
from fxstn.export import Examples, follow_by_export
from fxstn.hp import HyperparameterSpace, Spec
from fxstn.hyperize import hyperize, response_modules, responses
from fxstn.layout import Layouts, layouts
from fxstn.network import METHODS, SelfTuningNetwork
from fxstn.pushforward import linearized, perturbed, pushforward, trained
from fxstn.simplify import simplify
from fxstn.trace import frozen_modules
from fxstn.trace import trace as trace_module

RUNGS = ("fx", "export")  # ways to follow a forward, in the order that "auto" tries them
# Each graph is made from the conditioned training graph or the evaluation graph by one last pass.
LAST_PASS: dict[str, Callable[[fx.GraphModule, Layouts], fx.GraphModule]] = {
    "pushforward": pushforward,
    "linearized": linearized,
    "perturbed": perturbed,
    "trained": trained,
}


def followed(
    model: nn.Module, training: bool, frozen: Collection[str], examples: Examples | None = None, trace: str = "auto"
) -> fx.GraphModule:
    """trace → canonicalize, by the first rung that can follow the forward. Raises TransformError with the problems of all."""
    problems: list[Problem] = []
    for rung in RUNGS if trace == "auto" else (trace,):
        try:
            if rung == "fx":
                return canonicalize(trace_module(model, training, frozen, len(examples.inputs) if examples else 0))
            if examples is not None:
                return canonicalize(follow_by_export(model, training, frozen, examples))
        except TransformError as error:
            problems += error.problems
    raise TransformError(list(dict.fromkeys(problems)))


def examples_of(model: nn.Module, example_inputs: Any) -> Examples | None:
    """A tuple of positional inputs, one input, or None for no examples."""
    if example_inputs is None:
        return None
    return Examples.of(model, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))


@dataclass(frozen=True)
class Recipe:
    """What the passes need besides the modules themselves to build a graph, and to build it again after a copy.

    binding: which λ belongs where. frozen: modules that stay in eval mode. examples, trace: how the forward is followed.
    """

    binding: Binding
    frozen: tuple[str, ...]
    examples: Examples | None
    trace: str

    def canonical(self, root: nn.Module, training: bool) -> fx.GraphModule:
        """The graph of root's child `model` in one mode, with the children `hparams` and `response` beside it."""
        graph = followed(root.get_submodule("model"), training, self.frozen, self.examples, self.trace)
        return with_children(graph, root)

    def emit(self, canonical: fx.GraphModule, name: str, places: Layouts) -> fx.GraphModule:
        """Build one graph by name: "train", "eval", "trained", "pushforward", "linearized", "perturbed", or with "_eval".

        The passes, in order: (trace → canonicalize →) condition → hyperize → pushforward or a sibling → simplify.
        places: where the examples are, from `layouts`; empty for a plain batch.
        """
        graph = condition(canonical, () if name.endswith("eval") else self.binding.sites, places)
        kind = name.removesuffix("_eval")
        if kind in LAST_PASS:
            graph = LAST_PASS[kind](hyperize(graph), places)
        return simplify(graph)

    locate = staticmethod(layouts)


def with_children(graph: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    for child in ("hparams", "response"):
        graph.add_module(child, root.get_submodule(child))
    return graph


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
    uncentred, one objective). trace: how the forward is followed: "fx", symbolic tracing; "export", torch.export with the
    example_inputs, where Python may branch on sizes and later inputs must have the same ones, dimension 0 aside; "auto", the
    first that can.

    Modules in eval mode while the model is in train mode (a frozen batch norm) stay frozen.

    Raises TransformError, with every problem at once, where the model cannot be followed; ValueError for a spec that
    matches nothing, a start outside its range, two hyperparameters of one name, nothing to tune, an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if trace not in ("auto", *RUNGS):
        raise ValueError(f"trace={trace!r} is not one of auto, {', '.join(RUNGS)}")
    if trace == "export" and example_inputs is None:
        raise ValueError("trace='export' needs example_inputs")
    model = copy.deepcopy(model)
    frozen = tuple(sorted(frozen_modules(model)))
    examples = examples_of(model, example_inputs)
    graphs = [followed(model, training, frozen, examples, trace) for training in (True, False)]
    binding = bind(graphs[0], hparams)
    space = HyperparameterSpace(binding.quantities)
    found = responses(graphs)
    if not found.axes:
        raise ValueError(
            "no parameter can respond to the hyperparameters: the model has no trainable linear or convolution layer "
            "whose parameters it uses directly; fxstn.explain(model) lists why"
        )
    reference = next(model.parameters())
    space.to(device=reference.device, dtype=reference.dtype)
    network = SelfTuningNetwork(
        model,
        response_modules(model, found, len(space)),
        space,
        binding.penalties,
        method,
        Recipe(binding, frozen, examples, trace),
    )
    for training, graph in zip((True, False), graphs, strict=True):
        network.keep_canonical(training, with_children(graph, network))
    for name in ("train", "eval", "pushforward", "pushforward_eval"):
        network.graph(name)
    if example_inputs is not None:
        network.check(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    return network
