"""The graphs of one network: emitted when first asked for, forgotten by its copies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxstn.frontends.changes import Change, ModuleState, refuse, refuse_other_sites, respond_where_trained
from fxstn.frontends.inputs import Inputs, arguments_of, inputs_of_graph
from fxstn.frontends.interface import Frontend, Graph, Plan, Root
from fxstn.frontends.region import CompiledRegion, Finish, let_batch_vary, unchanged
from fxstn.frontends.sizes import size_requirements, unmet_requirement
from fxstn.hp.binding import Binding
from fxstn.hp.space import HyperparameterSpace
from fxstn.ir.errors import TransformError
from fxstn.ir.graph_kind import GraphKind
from fxstn.ir.graphs import own_inputs
from fxstn.ir.tangents import BATCH_FIRST, BatchAxes
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.parameters import parameters_in

MANY = 8  # captures for other sizes, after which a warning says so


class Recipe(Protocol):
    """Makes the graphs of a network from its modules. It holds none of them, so that it is copied and pickled with them.

    frontend: how the forward is followed.
    plan: what is decided once for all graphs.
    """

    @property
    def frontend(self) -> Frontend: ...

    @property
    def plan(self) -> Plan: ...

    def for_sizes(self, root: Root, inputs: Inputs) -> tuple[Recipe, list[fx.GraphModule]]:
        """The recipe for inputs of other sizes, and the canonical graphs that hold for them."""

    def with_binding(self, binding: Binding) -> Recipe:
        """The same with another decision on which λ belongs where."""

    def with_frozen(self, frozen: tuple[str, ...]) -> Recipe:
        """The same with other modules that stay in eval mode."""

    def canonical(self, root: Root, training: bool) -> fx.GraphModule:
        """The model's own graph in one mode, in canonical spelling."""

    def emit(self, root: Root, kind: GraphKind, batch_axes: BatchAxes) -> Graph:
        """One graph."""

    def locate(self, root: Root, training: bool, inputs: Inputs) -> BatchAxes:
        """Where the examples of a batch are in every value of the canonical graph."""


class GraphCache:
    """The graphs of one network by kind, and where the examples of its batches are. `root` in all methods: the network."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batch_axes: dict[bool, BatchAxes] = {}
        self.compile_options: dict[str, Any] | None = None
        self._per_example: bool | None = None
        self._located: list[torch.Size] = []  # sizes of the inputs that `batch_axes` come from
        self._single = False  # whether these had one example
        self.state: ModuleState | None = None
        self._forget()

    def _forget(self) -> None:
        self.canonical: dict[bool, fx.GraphModule] = {}
        self.emitted: dict[GraphKind, Graph] = {}
        self.compiled: dict[GraphKind, CompiledRegion] = {}
        self.others: list[NetworkOfSizes] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which read the very modules of this network; a copy makes its own."""
        return {**vars(self), "canonical": {}, "emitted": {}, "compiled": {}, "others": [], "state": None}

    def with_recipe(self, recipe: Recipe) -> GraphCache:
        """An empty cache for another recipe, with the canonical graphs where both follow the forward in the same way."""
        result = GraphCache(recipe)
        result.compile_options = self.compile_options
        if recipe.frontend is self.recipe.frontend and recipe.plan.frozen == self.recipe.plan.frozen:
            result.canonical = self.canonical
        return result

    def follow(self, root: Root, training: bool) -> None:
        """Make the graphs again where users have changed the modules since these were made.

        training: whether a graph of train mode runs next; only then is it looked which parameters require gradients.

        Raises ValueError for a change that no graph over the same parameters can follow, with the remedy.
        """
        model, rewritable = root.get_submodule("model"), self.recipe.frontend.rewritable
        if self.state is None:
            self.state = ModuleState(model, self.recipe.plan.frozen, rewritable)
        frozen = self.state.frozen() if root.training else None
        if (changes := self.state.changes()) or frozen is not None:
            self._follow_changes(root, changes, self.recipe.plan.frozen if frozen is None else frozen)
        if training and (names := self.state.newly_trained()) is not None:
            self.emitted.clear()
            self.compiled.clear()
            self.others.clear()
            constant = [name for name in names if name in self.recipe.plan.constant]
            respond_where_trained(root.get_submodule("response"), model, constant)

    def forget_modules(self) -> None:
        """Take the modules as they are at the next step for those of the graphs."""
        self.state = None

    def parameters(self, root: Root) -> Mapping[str, nn.Parameter]:
        """{name: parameter} of the model, with each name of a shared one, as they were when its modules were last looked at."""
        return parameters_in(root.get_submodule("model")) if self.state is None else self.state.named_parameters

    def _follow_changes(self, root: Root, changes: list[Change], frozen: tuple[str, ...]) -> None:
        """Make graphs for modules that have changed, with these in eval mode."""
        recipe = self.recipe.with_frozen(frozen)
        refuse(changes, recipe.plan, self.recipe.plan.frozen)
        if recipe.frontend.rewritable:
            before = self.canonical_graph(root, True) if True in self.canonical else None
            graphs = [recipe.canonical(root, training) for training in (True, False)]
            if before is not None:
                refuse_other_sites(recipe.plan.binding, before, graphs[0])
            self._forget()
            self.keep_canonical(graphs)
        else:
            self._forget()
        self.recipe, self.batch_axes, self._per_example = recipe, {}, None
        self.state = ModuleState(root.get_submodule("model"), frozen, recipe.frontend.rewritable)

    def keep_canonical(self, graphs: Sequence[fx.GraphModule]) -> None:
        """Use these canonical graphs, of train and of eval mode."""
        self.canonical = dict(zip((True, False), graphs, strict=True))

    def canonical_graph(self, root: Root, training: bool) -> fx.GraphModule:
        if training not in self.canonical:
            self.canonical[training] = self.recipe.canonical(root, training)
        return self.canonical[training]

    def graph(self, root: Root, kind: GraphKind) -> Graph:
        if kind not in self.emitted:
            self.emitted[kind] = self.recipe.emit(root, kind, self.batch_axes.get(kind.training, {}))
        return self.emitted[kind]

    def compile(self, options: dict[str, Any]) -> None:
        """Compile every graph from now on when it first runs, as a whole unless the options say otherwise."""
        self.compile_options, self.compiled, self.others = {"fullgraph": True} | options, {}, []

    def compiled_region(self, root: Root, kind: GraphKind) -> CompiledRegion:
        if kind not in self.compiled:
            graph = cast(fx.GraphModule, self.graph(root, kind))
            self.compiled[kind] = CompiledRegion(graph, self.compile_options or {})
        return self.compiled[kind]

    def for_sizes(self, root: Root, inputs: Inputs) -> tuple[GraphCache, Root]:
        """The graphs that hold for inputs of these sizes, and the network to make them for: these, or those of another capture.

        Raises ValueError where there are none.
        """
        if not self.recipe.frontend.rewritable or not size_requirements(self.canonical_graph(root, True).graph):
            return self, root
        arguments = arguments_of(root.get_submodule("model"), inputs)
        if not (reason := self._unmet(root, arguments)):
            return self, root
        for other in self.others:
            if not other.graphs._unmet(other, arguments):
                return other.graphs, other
        try:
            recipe, graphs = self.recipe.for_sizes(root, inputs)
        except (TransformError, ValueError) as error:
            said = error.problems[0].what if isinstance(error, TransformError) else str(error)
            raise ValueError(f"{reason}; no graph of its own can be made for these sizes: {said}") from error
        other = NetworkOfSizes(root, GraphCache(recipe))
        other.graphs.compile_options = self.compile_options
        other.graphs.keep_canonical(graphs)
        self.others.append(other)
        if len(self.others) % MANY == 0:
            warnings.warn(f"the forward was exported anew for {len(self.others)} sizes of its inputs, which takes time; pad "
                          'to a few lengths, or give transform, or fxstn.tune, trace="live"', stacklevel=2)  # fmt: skip
        return other.graphs, other

    def _unmet(self, root: Root, arguments: Mapping[str, Any]) -> str:
        """What the graphs of one of the modes require of the sizes of inputs and these do not have; "" for nothing."""
        graphs = (self.canonical_graph(root, training).graph for training in (True, False))
        return next(filter(None, (unmet_requirement(graph, arguments) for graph in graphs)), "")

    def run(
        self, root: Root, kind: GraphKind, inputs: Inputs, moved: dict[str, Tensor], finish: Finish = unchanged
    ) -> Any:
        """What a step does with what a graph returns. Both are compiled together, where they record gradients.

        moved: "delta" and "condition", where the graph takes them.
        """
        cache, root = self.for_sizes(root, inputs)
        options = self.compile_options if torch.is_grad_enabled() else None
        if options is not None and kind not in cache.compiled:
            cache._locate_examples(root, inputs)  # first, or the graph would be compiled again afterwards
        graph = cache.graph(root, kind)
        args, kwargs = inputs_of_graph(own_inputs(graph.graph), root.get_submodule("model"), inputs)
        if options is None:
            # not __call__, which at an error prints the code of the graph
            return finish(graph.forward(*args, **kwargs, **moved))
        if options.get("dynamic") is not False:
            let_batch_vary(batch_size(inputs), args, kwargs, moved, getattr(finish, "__dict__", {}))
        with warnings.catch_warnings():  # compiling looks at .grad of a δ that is computed from λ; of no concern
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            return cache.compiled_region(root, kind)(args, kwargs | moved, finish)

    def locate_examples(self, root: Root, inputs: Inputs) -> None:
        """Find out, once, where the examples of a batch are; graphs made for a plain batch are made again where they differ."""
        cache, root = self.for_sizes(root, inputs)
        cache._locate_examples(root, inputs)

    def _locate_examples(self, root: Root, inputs: Inputs) -> None:
        sizes = [leaf.shape[1:] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        single = batch_size(inputs) == 1  # then what all examples share is as long as the batch
        if self.batch_axes and (sizes == self._located or not self._is_folded()) and (single or not self._single):
            return
        self._located, self._single, self._per_example = sizes, single, None
        self.batch_axes = {training: self.recipe.locate(root, training, inputs) for training in (True, False)}
        if any(axis != BATCH_FIRST for axes in self.batch_axes.values() for axis in axes.values()):
            self.emitted.clear()
            self.compiled.clear()

    def _is_folded(self) -> bool:
        """Whether some value has sizes of the inputs on both sides of its examples: they are elsewhere at other sizes."""
        places = (axis for axes in self.batch_axes.values() for axis in axes.values() if axis is not None)
        return any(axis.left > 1 and axis.right > 1 for axis in places)

    def per_example(self, root: Root, inputs: Inputs) -> bool:
        """Whether every layer and every tuned strength can be perturbed per example, on inputs like these."""
        cache, root = self.for_sizes(root, inputs)
        return cache._is_per_example(root, inputs)

    def _is_per_example(self, root: Root, inputs: Inputs) -> bool:
        if self._per_example is None:
            self._locate_examples(root, inputs)
            objective = "pushforward" if root.method == "delta" else "perturbed"
            graphs = [self.graph(root, GraphKind(objective, training)) for training in (True, False)]
            places = dict.fromkeys(place for graph in graphs for place in self.recipe.frontend.refused(graph, inputs))
            self._per_example = not places
            alike = {index for graph in graphs for index in self.recipe.frontend.shared_strengths(graph)}
            cast(HyperparameterSpace, root.get_submodule("hparams")).draw_alike(alike)
            frontend = (
                self.recipe.frontend
            )  # as it is, a forward is perturbed by batch where weights are moved in its place
            if places and (frontend.rewritable or (root.method == "delta" and not frontend.derivatives)):
                others = f" and {len(places) - 1} more" if len(places) > 1 else ""
                warnings.warn(
                    f"one ε for the whole batch, not one per example, which makes λ noisier: refused at {next(iter(places))}"
                    f"{others}; fxstn.explain(stn, example_inputs=...) lists them",
                    stacklevel=4,
                )
        return self._per_example


@dataclass
class NetworkOfSizes:
    """A network as the graphs of another capture, for other sizes of the inputs, see it."""

    network: Root
    graphs: GraphCache

    @property
    def training(self) -> bool:
        return self.network.training

    @property
    def method(self) -> str:
        return self.network.method

    def get_submodule(self, target: str) -> nn.Module:
        return self.network.get_submodule(target)

    def canonical(self, training: bool) -> fx.GraphModule:
        return self.graphs.canonical_graph(self, training)
