"""SelfTuningNetwork: what `transform` returns. Runs the emitted graphs; knows no pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxstn.frontends.interface import Frontend, Graph, Plan
from fxstn.hp.binding import Binding
from fxstn.hp.space import HyperparameterSpace
from fxstn.hp.terms import LossTerms
from fxstn.ir.errors import Diagnostic
from fxstn.ir.graph_kind import GraphKind, graph_kind
from fxstn.ir.staging import with_breaks
from fxstn.ir.tangents import BATCH_FIRST, BatchAxes
from fxstn.ops.penalty import penalty, penalty_perturbed
from fxstn.ops.response import Response, for_all_examples, parameter_changes, pulled_back

METHODS = ("delta", "centered", "stn")


@contextmanager
def held(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters as constants: nothing computed inside records a gradient for them."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class Recipe(Protocol):
    """Makes the graphs of one network, now and again after a copy. root: the network."""

    @property
    def frontend(self) -> Frontend: ...

    @property
    def plan(self) -> Plan: ...

    def with_binding(self, binding: Binding) -> Recipe:
        """The same with another decision on which λ belongs where."""

    def canonical(self, root: SelfTuningNetwork, training: bool) -> fx.GraphModule: ...

    def emit(self, root: SelfTuningNetwork, kind: GraphKind, batch_axes: BatchAxes) -> Graph: ...

    def locate(self, root: SelfTuningNetwork, training: bool, inputs: tuple) -> BatchAxes: ...


class SelfTuningNetwork(nn.Module):
    """A network with its hyperparameters λ and the response Θ of its weights to them.

    recipe: makes the graphs from the children.
    rejected: what stood in the way of the frontends before this one.
    augments: whether the model has modules that stay random in eval mode, as torchvision's transforms do, so that its
        evaluation graph runs in its place.

    Children: `model`, the original (a copy); `response`, a Response per parameter name; `hparams`, the λ and σ. In train
    mode `stn(x)` is the network conditioned on λ₀, in eval mode the plain network, bit for bit. Graphs are built when
    first asked for and rebuilt after unpickling or copying; moving the module moves what they read.
    """

    model: nn.Module
    response: nn.Module
    hparams: HyperparameterSpace

    def __init__(
        self,
        model: nn.Module,
        response: nn.Module,
        hparams: HyperparameterSpace,
        terms: LossTerms,
        method: str,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.model, self.response, self.hparams = model, response, hparams
        self.terms, self.method = terms, method
        self.recipe = recipe
        self._canonical: dict[bool, fx.GraphModule] = {}
        self._graphs: dict[GraphKind, Graph] = {}
        self._compiled: dict[GraphKind, Any] = {}
        self._batch_axes: dict[bool, BatchAxes] = {}
        self._per_example: bool | None = None
        self._compile_options: dict[str, Any] | None = None
        self.augments = False
        self.rejected: tuple[Diagnostic, ...] = ()
        self.train(model.training)

    # Graphs

    def graph(self, name: str) -> Graph:
        """The emitted graph: "train", "eval", "pushforward" or "pushforward_eval"; also those of the objectives, "general",
        "linearized", "perturbed", "trained", which return (output, auxiliary) where there are any.

        Its inputs are the model's own, then `condition` and, where weights move, `delta`. Parameters are shared.
        """
        return self._graph(graph_kind(name))

    def _graph(self, kind: GraphKind) -> Graph:
        if kind not in self._graphs:
            self._graphs[kind] = self.recipe.emit(self, kind, self._batch_axes.get(kind.training, {}))
        return self._graphs[kind]

    def canonical(self, training: bool) -> fx.GraphModule:
        """The model's own graph in one mode, in canonical spelling: what every other graph is made from."""
        if training not in self._canonical:
            self._canonical[training] = self.recipe.canonical(self, training)
        return self._canonical[training]

    def keep_canonical(self, graphs: Sequence[fx.GraphModule]) -> None:
        """Use these graphs of the model, of train and of eval mode, as the canonical ones."""
        for training, graph in zip((True, False), graphs, strict=True):
            self._canonical[training] = graph

    @property
    def frontend(self) -> str:
        """Which frontend follows the forward: "fx", "export" or "live"."""
        return self.recipe.frontend.name

    def locate_examples(self, *inputs: Any) -> None:
        """Find out, once, where the examples of a batch are in every value, by running a few of them.

        Perturbations per example need it; the losses and `pushforward` call it with the first batch they see.
        """
        if self._batch_axes:
            return
        self._batch_axes = {training: self.recipe.locate(self, training, inputs) for training in (True, False)}
        if any(axis != BATCH_FIRST for batch_axes in self._batch_axes.values() for axis in batch_axes.values()):
            self._graphs.clear()
            self._compiled.clear()

    def per_example(self, *inputs: Any) -> bool:
        """Whether every layer and every tuned strength can be perturbed per example, on inputs like these."""
        if self._per_example is None:
            self.locate_examples(*inputs)
            graphs = (self.graph("pushforward"), self.graph("pushforward_eval"))
            lost = (node.target is for_all_examples for graph in graphs for node in graph.graph.nodes)
            self._per_example = not any(lost)
        return self._per_example

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Run every graph through `torch.compile(graph, fullgraph=True, **options)` from now on; between its recurrent layers,
        which run as they are, where it has any.

        A graph is compiled when it first runs, and again for another batch size. Losses, optimizers and the plain network
        in eval mode are not touched. Raises ValueError for a network of frontend "live", which has no graph to compile, and
        with hp.JacobianNorm: compiled graphs lose the derivatives of their gradients (pytorch issue 181581).
        """
        if self.frontend == "live":
            raise ValueError(
                'a network that runs as it is (frontend "live") cannot be compiled; see `rejected` for the reasons'
            )
        if self.terms.jacobian:
            raise ValueError("a network with hp.JacobianNorm cannot be compiled: its gradient is differentiated again")
        self._compile_options, self._compiled = {"fullgraph": True} | options, {}

    def _compiled_graph(self, kind: GraphKind) -> Any:
        if kind not in self._compiled:
            graph: Any = self._graph(kind)
            options, broken = self._compile_options or {}, with_breaks(graph)
            options = options if broken is None else options | {"fullgraph": False}
            self._compiled[kind] = torch.compile(broken or graph, **options)
        return self._compiled[kind]

    def with_recipe(self, recipe: Recipe) -> SelfTuningNetwork:
        """A network over the same modules and parameters whose graphs are made by another recipe."""
        result = self.__class__.__new__(self.__class__)
        result.__dict__ = {**self.__dict__, "recipe": recipe, **_no_graphs(), "_batch_axes": {}, "_per_example": None}
        if recipe.frontend is self.recipe.frontend and recipe.plan.frozen == self.recipe.plan.frozen:
            result._canonical = self._canonical  # the same forward, followed in the same way
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_no_graphs()}

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfTuningNetwork:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        result.__dict__ = {key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()}
        return result

    # Parameters

    def general_parameters(self) -> Iterator[nn.Parameter]:
        """w₀: the original network's parameters."""
        return self.model.parameters()

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Θ: U, and R where the response is structured, of every parameter that responds."""
        return self.response.parameters()

    @property
    def structured(self) -> bool:
        """Whether R is learned (paper, Eq. 3.14), or every unit of the weights only scaled."""
        return any(m.R is not None for m in self.response.modules() if isinstance(m, Response))

    def best_response(self, delta: Tensor) -> dict[str, Tensor]:
        """Weights that the response predicts at λ₀ + delta: w₀ + Θ·delta (paper, Eq. 3.1; Φλ + φ₀ for "stn").

        delta: (h,), unconstrained units. Returns one tensor per original parameter, in its shape.
        Raises ValueError when delta does not have h entries.
        """
        delta = self._checked(delta, "delta")
        if delta.dim() != 1:
            raise ValueError(f"best_response takes one delta of shape ({len(self.hparams)},), got {tuple(delta.shape)}")
        if self.method == "stn":
            delta = delta + self.hparams.unconstrained
        changes = parameter_changes(self.response, self.model, delta)
        return {
            name: parameter + changes[name] if name in changes else parameter
            for name, parameter in self.model.named_parameters()
        }

    @torch.no_grad()
    def hypergradient(self) -> Tensor:
        """Θᵀ g, (h,): the derivative in λ, through the response, of the loss whose gradient g the general parameters hold.

        After `general_loss(...).backward()` it is that of the training loss, which is zero where the weights are at their
        best: see `BilevelRunner`, inner_correction. Parameters without .grad count as zero. Not for method "stn".
        """
        return torch.zeros_like(self.hparams.unconstrained) + pulled_back(self.response, self.model)

    def export(self) -> nn.Module:
        """A plain model of the original class with the trained weights; its state_dict loads strict=True."""
        plain = copy.deepcopy(self.model)
        if self.method == "stn":
            with torch.no_grad():
                folded = self.best_response(torch.zeros_like(self.hparams.unconstrained))
                for name, parameter in plain.named_parameters():
                    parameter.copy_(folded[name])
        return plain

    # Forward passes

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Train mode: the network conditioned on λ₀. Eval mode: the plain network."""
        if self.method == "stn":
            delta = self.hparams.unconstrained.detach()
            if self.training:
                return self._with_auxiliary(self._call(GraphKind("trained", True), inputs, delta=delta, **named))[0]
            return self._call(GraphKind("perturbed", False), inputs, delta=delta, **named)
        if self.training or self.augments:
            return self._call(GraphKind("plain", self.training), inputs, **named)
        return self.model(*inputs, **named)

    def _call(self, kind: GraphKind, inputs: tuple, **named: Any) -> Any:
        graph = self._graph(kind)
        first = takewhile(lambda node: node.op == "placeholder", graph.graph.nodes)
        own = [str(node.target) for node in first if node.name not in ("condition", "delta")]
        if len(inputs) > len(own) and not any(target.startswith("*") for target in own):
            raise TypeError(
                f"the network was traced with the inputs ({', '.join(own)}) and got {len(inputs)}; give transform "
                "example_inputs with all the inputs you pass"
            )
        if self._compile_options is None:
            return graph.forward(*inputs, **named)  # not __call__, which at an error prints the code of the graph
        with warnings.catch_warnings():  # compiling looks at .grad of a δ that is computed from λ; of no concern
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            return self._compiled_graph(kind)(*inputs, **named)

    def conditioned_output(self, *inputs: Any) -> tuple[Any, tuple]:
        """(output, auxiliary) of the training graph at λ₀ and w₀, whatever the module's mode. auxiliary: a value for each of
        `terms.auxiliary`."""
        return self._with_auxiliary(self._call(GraphKind("general" if self.terms.auxiliary else "plain", True), inputs))

    def _with_auxiliary(self, result: Any) -> tuple[Any, tuple]:
        return result if self.terms.auxiliary else (result, ())

    def pushforward(self, *inputs: Any, delta: Tensor, condition: Tensor | None = None) -> tuple[Any, Any]:
        """(y, dy): the output at w₀ and its directional derivative dy = J_yw Θ·delta (paper, Eq. 3.11).

        delta: (h,) for the whole batch or (batch, h), unconstrained units; moves the weights only. condition: the same
        shapes or None; moves the strengths of dropout to λ₀ + condition in train mode. y and dy have the model's output
        structure; dy is None for leaves that are not float. w₀ is held fixed: gradients reach Θ and delta only.
        Raises ValueError for another shape, or for more rows than examples.
        """
        return self._run(GraphKind("pushforward", self.training), inputs, delta, condition)

    def perturbed_output(
        self,
        *inputs: Any,
        delta: Tensor,
        condition: Tensor | None = None,
        training: bool | None = None,
        update_statistics: bool = False,
    ) -> tuple[Any, tuple]:
        """(output, auxiliary) that the method trains Θ and λ on, at weights moved by delta; shapes as in `pushforward`.

        "delta": y + dy, linearised before a final softmax or sigmoid (Eq. 3.13). "centered": f(x; w₀ + Θ·delta).
        "stn": f(x; φ₀ + Φ(λ + delta)), with delta added to λ here; gradients reach φ₀ too. training: None for the
        module's own mode. update_statistics: whether batch norms count this batch ("stn" in train mode only). auxiliary: as in
        `conditioned_output`; none in eval mode.
        """
        objective = "linearized" if self.method == "delta" else "trained" if update_statistics else "perturbed"
        kind = GraphKind(objective, self.training if training is None else training)
        if self.method == "stn":
            delta = delta + self.hparams.unconstrained.detach()
        output = self._run(kind, inputs, delta, condition)
        return self._with_auxiliary(output) if kind.training else (output, ())

    def _run(self, kind: GraphKind, inputs: tuple, delta: Tensor, condition: Tensor | None) -> Any:
        moved = {"delta": self._checked(delta, "delta", inputs)}
        if condition is not None:
            moved["condition"] = self._checked(condition, "condition", inputs)
        if any(value.dim() > 1 for value in moved.values()):
            self.locate_examples(*inputs)
        with held(() if self.method == "stn" else self.general_parameters()):
            return self._call(kind, inputs, **moved)

    def _checked(self, value: Tensor, name: str, inputs: tuple = ()) -> Tensor:
        h = len(self.hparams)
        if not isinstance(value, Tensor) or value.dim() not in (1, 2) or value.shape[-1] != h:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must have shape ({h},) or (batch, {h}), one entry per hyperparameter; got {got}")
        if value.dim() == 2 and inputs and value.shape[0] != batch_size(inputs):
            raise ValueError(f"{name} has {value.shape[0]} rows for a batch of {batch_size(inputs)} examples")
        return value

    def penalty(self, condition: Tensor | None = None) -> Tensor | float:
        """Σ ½ λ ‖w‖², or λ ‖w‖₁, over the layers with weight decay: at λ₀ and w₀, or, given ε of shape (h,) or (batch, h), the
        mean over the batch at λ₀ + ε and w₀ + Θε. 0.0 where no weight decay is tuned."""
        if not self.terms.penalties:
            return 0.0
        strengths = self.hparams(condition)
        parameters = dict(self.model.named_parameters())
        total: Tensor | float = 0.0
        for name, index, norm in self.terms.penalties:
            response = self._response(name)
            weight: Tensor = parameters[name]
            if condition is not None and self.method != "stn":
                weight = weight.detach()
            if condition is None or response is None:
                total = total + penalty(weight, strengths[..., index].mean(), norm)
                continue
            delta = condition + self.hparams.unconstrained.detach() if self.method == "stn" else condition
            scale = response(delta)
            total = total + penalty_perturbed(
                weight, strengths[..., index], scale, response.direction(weight), response.axis, norm
            )
        return total

    def _response(self, name: str) -> Response | None:
        try:
            found = self.response.get_submodule(name)
        except AttributeError:
            return None
        return found if isinstance(found, Response) else None


def _no_graphs() -> dict[str, Any]:
    """State of a network that has to make its graphs again."""
    return {"_graphs": {}, "_canonical": {}, "_compiled": {}}


def batch_size(inputs: Any) -> int:
    """Examples in a batch: dimension 0 of its first tensor. Raises ValueError when it holds no tensor."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the inputs hold no tensor with a batch dimension")
