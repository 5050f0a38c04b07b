"""The recipe of a network: what is decided once, and how each graph is made, before and after a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fxstn.frontends.decompositions.layer_drop import LOOPS, LayerLoop
from fxstn.frontends.decompositions.recognition import recognise_dropout
from fxstn.frontends.inputs import Inputs, InputSpec, arguments_of
from fxstn.frontends.interface import Frontend, Graph, Pass, Plan, Root
from fxstn.frontends.selection import errors_as_diagnostics
from fxstn.hp import Spec
from fxstn.hp.binding import Binding
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.tangents import BatchAxes
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.example_axes import find_batch_axes
from fxstn.passes.match import bind


@dataclass(frozen=True)
class PipelineRecipe:
    """Makes the graphs of one network from its modules. It holds none of them, so that it is copied and pickled with them.

    frontend: how the forward is followed.
    plan: what is decided once for all graphs; each is made by a copy with its kind and batch axes.
    pipelines: `fxstn.transform.PIPELINES`, the passes by objective.
    hparams: what is tuned, as `transform` gets it.
    loops: of the model's classes that skip layers at random. Another process, which loads the network, enters them anew.
    """

    frontend: Frontend
    plan: Plan
    pipelines: Mapping[str, Sequence[Pass]]
    hparams: Sequence[Spec] | None
    loops: Mapping[type[nn.Module], LayerLoop] = field(default_factory=dict)

    def with_binding(self, binding: Binding) -> PipelineRecipe:
        """The same with another decision on which λ belongs where."""
        return replace(self, plan=replace(self.plan, binding=binding))

    def with_frozen(self, frozen: tuple[str, ...]) -> PipelineRecipe:
        """The same with other modules that stay in eval mode."""
        return replace(self, plan=replace(self.plan, frozen=frozen))

    def for_sizes(self, root: Root, inputs: Inputs) -> tuple[PipelineRecipe, list[fx.GraphModule]]:
        """The recipe for inputs of other sizes, and the model's own graphs that hold for them, of train and of eval mode.

        Raises TransformError where there are none, ValueError where λ has other places in them.
        """
        model = self._model(root)
        spec = InputSpec.of(model, inputs)
        assert spec is not None
        frontend = self.frontend.for_sizes(spec)
        graphs = canonical_graphs(frontend, model, self.plan.frozen, inputs)
        old, new = self.plan.binding, bind(graphs[0], self.hparams)
        if [p.name for p in new.hyperparameters] != [p.name for p in old.hyperparameters]:
            raise ValueError('the hyperparameters have other places in it; give transform trace="live"')
        bound = {(site.path, site.insert, type(site.spec)) for site in old.sites}  # verify leaves some out
        sites = tuple(site for site in new.sites if (site.path, site.insert, type(site.spec)) in bound)
        binding = replace(new, sites=sites, dropped=old.dropped)
        recipe = replace(self, frontend=frontend, plan=replace(self.plan, binding=binding))
        return recipe, [with_children(graph, root) for graph in graphs]

    def canonical(self, root: Root, training: bool) -> fx.GraphModule:
        """The model's own graph in one mode, in canonical spelling, with the children of root."""
        model = self._model(root)
        return with_children(canonicalize(self.frontend.capture(model, training, self.plan.frozen, None)), root)

    def emit(self, root: Root, kind: GraphKind, batch_axes: BatchAxes) -> Graph:
        """One graph."""
        plan = replace(self.plan, kind=kind, batch_axes=batch_axes)
        self._model(root)
        return self.frontend.emit(root, plan, self.pipelines[kind.objective])

    def _model(self, root: Root) -> nn.Module:
        """The model, whose random modules are known in this process afterwards."""
        model = root.get_submodule("model")
        LOOPS.update(self.loops)
        recognise_dropout(model)
        return model

    def locate(self, root: Root, training: bool, inputs: Inputs) -> BatchAxes:
        """Where the examples of a batch are in every value of the canonical graph; {} where there is none."""
        if not self.frontend.rewritable:
            return {}
        return find_batch_axes(root.canonical(training), arguments_of(root.get_submodule("model"), inputs))


def with_children(graph: fx.GraphModule, root: Root) -> fx.GraphModule:
    """The graph of a model with the network's other children beside it."""
    for child in ("hparams", "response"):
        graph.add_module(child, root.get_submodule(child))
    return graph


def canonical_graphs(frontend: Frontend, model: nn.Module, frozen: Sequence[str], inputs: Inputs | None) -> list[Any]:
    """The model's training and evaluation graph, as far as passes need them to decide."""
    with errors_as_diagnostics("following the forward"):
        captured = frontend.captures(model, frozen, inputs)
        return [canonicalize(graph) for graph in captured] if frontend.rewritable else captured
