"""SelfTuningNetwork: what `transform` returns. Runs the emitted graphs; knows no pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from fxstn.frontends.graph_cache import GraphCache, Recipe
from fxstn.frontends.inputs import Inputs
from fxstn.frontends.interface import Graph
from fxstn.frontends.region import Finish, unchanged, without_auxiliary
from fxstn.frontends.wrapper import ModelWrapper
from fxstn.hp.space import HyperparameterSpace
from fxstn.hp.summary import Summarized
from fxstn.hp.terms import LossTerms
from fxstn.ir.copies import deep_copy
from fxstn.ir.errors import Diagnostic
from fxstn.ir.graph_kind import GraphKind, graph_kind
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.penalty import Metric, total_penalty
from fxstn.ops.pull_back import pull_back_gradients
from fxstn.ops.response import Response, ResponseTree, frozen, parameter_changes, responding


class SelfTuningNetwork(Summarized, ModelWrapper):
    """What `fxstn.transform` returns: a network with its hyperparameters λ and the response Θ of its weights to them.

    recipe: makes the graphs from the children.
    rejected: what stood in the way of the frontends before this one.
    augments: whether its evaluation graph runs in place of a model that is random in eval mode or takes derivatives.

    Children: `model`, the original (a copy); `response`, a Response per parameter name; `hparams`, the λ and σ. In train
    mode `stn(x)` is the network conditioned on λ₀, in eval mode the plain network, bit for bit. Graphs are emitted when they
    are needed, and share the parameters. What users change on the modules is followed, or refused (docs/guides/runner.md).
    """

    model: nn.Module
    response: ResponseTree
    hparams: HyperparameterSpace
    terms: LossTerms
    method: str
    augments: bool = False
    rejected: tuple[Diagnostic, ...] = ()
    decay_metric: Metric | None = None  # D of decoupled weight decay, see `total_penalty`

    def __init__(
        self,
        model: nn.Module,
        response: ResponseTree,
        hparams: HyperparameterSpace,
        terms: LossTerms,
        method: str,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.model, self.response, self.hparams = model, response, hparams
        self.terms, self.method, self.training = terms, method, model.training
        self._graphs = GraphCache(recipe)

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module. Modules that were in eval mode while the network was in train mode stay in eval mode."""
        self._graphs.follow(self, False)
        super().train(mode)
        for path in self.recipe.plan.frozen if mode else ():
            self.model.get_submodule(path).training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert all tensors. torch may put new parameters in place of the old ones, which is no change of a user's."""
        self._graphs.follow(self, False)
        super()._apply(fn, recurse)
        self._graphs.forget_modules()
        return self

    # Graphs

    def graph(self, name: str) -> Graph:
        """The emitted graph of a name: "train", "eval", "pushforward" or "pushforward_eval"; also those of the objectives,
        "general", "linearized", "perturbed", "trained", "at_rest_eval", which return (output, auxiliary) where there are any.

        Its inputs are the model's own, then `condition` and, where weights move, `delta`. Parameters are shared.
        """
        self._graphs.follow(self, False)
        return self._graphs.graph(self, graph_kind(name))

    def canonical(self, training: bool) -> fx.GraphModule:
        """The model's own graph in a mode, training or not, in canonical spelling: what every other graph is made from."""
        return self._graphs.canonical_graph(self, training)

    def keep_canonical(self, graphs: Sequence[fx.GraphModule]) -> None:
        """Use these graphs of the model, of train and of eval mode, as the canonical ones."""
        self._graphs.keep_canonical(graphs)

    @property
    def recipe(self) -> Recipe:
        """What makes the graphs from the children."""
        return self._graphs.recipe

    @property
    def frontend(self) -> str:
        """Which frontend follows the forward: "fx", "export" or "live"."""
        return self.recipe.frontend.name

    def locate_examples(self, *inputs: object, **named: object) -> None:
        """Find out, once, where the examples of a batch are in every value, by running a few of them: for perturbations per
        example. The losses and `pushforward` call it with the first batch they see.
        """
        self._graphs.locate_examples(self, Inputs(inputs, named))

    def per_example(self, *inputs: object, **named: object) -> bool:
        """Whether every layer and every tuned strength can be perturbed per example, on inputs like these."""
        return self._graphs.per_example(self, Inputs(inputs, named))

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Run every graph that records gradients through `torch.compile(fullgraph=True, **options)` from now on.

        An objective is compiled with its graph, from the inputs to the loss, when it first runs. The plain network in eval mode
        is not touched. Raises ValueError for a network of frontend "live", which has no graph to compile, and with
        hp.JacobianNorm: compiled graphs lose the derivatives of their gradients (pytorch issue 181581).
        """
        if self.frontend == "live":
            raise ValueError('a network of frontend "live" has no graph to be compiled; `rejected` has the reasons')
        if self.terms.jacobian:
            raise ValueError("a network with hp.JacobianNorm cannot be compiled: its gradient is differentiated again")
        self._graphs.compile(options)

    def with_recipe(self, recipe: Recipe) -> SelfTuningNetwork:
        """A network over the same modules and parameters whose graphs are made by another recipe."""
        result = copy.copy(self)
        result._graphs = self._graphs.with_recipe(recipe)
        return result

    # Parameters

    @property
    def named_weights(self) -> Mapping[str, nn.Parameter]:
        """{name: parameter} of the original network, each name of a shared one too, as the last step saw them."""
        return self._graphs.parameters(self)

    def general_parameters(self) -> Iterator[nn.Parameter]:
        """w₀: the original network's parameters."""
        return self.model.parameters()

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Θ: the scales U of all parameters that respond in one tensor, and R of each where the response is structured."""
        return self.response.parameters()

    @property
    def structured(self) -> bool:
        """Whether R is learned (paper, Eq. 3.14), or every unit of the weights only scaled."""
        return any(m.R is not None for m in self.response.modules() if isinstance(m, Response))

    def best_response(self, delta: Tensor) -> dict[str, Tensor]:
        """Weights that the response predicts at λ₀ + delta: w₀ + Θ·delta (paper, Eq. 3.1; Φλ + φ₀ for "stn").

        delta: (h,), unconstrained units.

        Returns one tensor per original parameter, in its shape and type. Raises ValueError when delta does not have h entries.
        """
        return {name: w.to(self.model.get_parameter(name)) for name, w in self.wide_response(delta).items()}

    def wide_response(self, delta: Tensor) -> dict[str, Tensor]:
        """`best_response`(delta), not rounded to a parameter's type: at least float32 where it moves. Raises ValueError."""
        delta = self.hparams.checked(delta, "delta")
        if delta.dim() != 1:
            raise ValueError(f"best_response takes one delta of shape ({len(self.hparams)},), got {tuple(delta.shape)}")
        if self.method == "stn":
            delta = delta + self.hparams.unconstrained
        changes = parameter_changes(self.response, self.model, delta)
        return {n: weight + changes[n] if n in changes else weight for n, weight in self.model.named_parameters()}

    def hypergradient(self) -> Tensor:
        """Θᵀ g, (h,): the derivative in λ, through the response, of the loss whose gradient g the general parameters hold.

        After `general_loss(...).backward()` it is that of the training loss, which is zero where the weights are at their
        best: see `fxstn.HyperSettings`, inner_correction. Parameters without .grad count as zero. Not for method "stn". With a
        GradScaler, read it after `unscale_`. It is not finite where a gradient overflowed; drop it then.
        """
        return pull_back_gradients(self.response, self.named_weights).to(self.hparams.unconstrained)

    def export(self) -> nn.Module:
        """A plain model of the original class with the trained weights; its state_dict loads strict=True."""
        plain = deep_copy(self.model)
        if self.method == "stn":
            with torch.no_grad():
                folded = self.best_response(torch.zeros_like(self.hparams.unconstrained))
                for name, parameter in plain.named_parameters():
                    parameter.copy_(folded[name])
        return plain

    # Forward passes

    def forward(self, *inputs: object, **named: object) -> Any:
        """Train mode: the network conditioned on λ₀. Eval mode: the plain network."""
        if self.training or self.augments:
            self._graphs.follow(self, self.training)
        if self.method == "stn":
            delta = self.hparams.unconstrained.detach()
            if self.training:
                return self._with_auxiliary(self.run(GraphKind("trained", True), Inputs(inputs, named), delta=delta))[0]
            return self.run(GraphKind("perturbed", False), Inputs(inputs, named), delta=delta)
        if self.training or self.augments:
            return self.run(GraphKind("plain", self.training), Inputs(inputs, named))
        return self.model(*inputs, **named)

    def run(self, kind: GraphKind, inputs: Inputs, finish: Finish = unchanged, **moved: Tensor) -> Any:
        """finish(what the graph of a kind returns for inputs), compiled together where graphs are compiled.

        moved: "delta" and "condition", where the graph takes them.
        """
        return self._graphs.run(self, kind, inputs, moved, finish)

    def conditioned_output(self, *inputs: object, finish: Finish | None = None, **named: object) -> Any:
        """(output, auxiliary) of the training graph at λ₀ and w₀, in either mode of the module.

        auxiliary: a value for each of `terms.auxiliary`.
        finish: None, or what is called with the pair (without such terms, with the output) and returns the result.
        """
        self._graphs.follow(self, True)
        kind = GraphKind("general" if self.terms.auxiliary else "plain", True)
        return self.run(kind, Inputs(inputs, named), finish or self._with_auxiliary)

    def _with_auxiliary(self, result: Any) -> tuple[Any, tuple]:
        return result if self.terms.auxiliary else (result, ())

    def pushforward(
        self, *inputs: object, delta: Tensor, condition: Tensor | None = None, **named: object
    ) -> tuple[Any, Any]:
        """(y, dy): the output at w₀ and its directional derivative dy = J_yw Θ·delta (paper, Eq. 3.11).

        delta: (h,) for the whole batch or (batch, h), unconstrained units. It moves weights: dy only.
        condition: of the same shapes, or None for zero. In train mode random operations have the strengths at λ₀ + condition.

        y and dy have the model's output structure; dy is None for leaves that are not float. w₀ is a constant: gradients reach
        Θ and delta only. Raises ValueError for another shape, or for another number of rows than examples.
        """
        return self._run(GraphKind("pushforward", self.training), Inputs(inputs, named), delta, condition)

    def perturbed_output(
        self,
        *inputs: object,
        delta: Tensor,
        condition: Tensor | None = None,
        training: bool | None = None,
        update_statistics: bool = False,
        finish: Finish | None = None,
        **named: object,
    ) -> Any:
        """(output, auxiliary) that the method trains Θ and λ on, at weights moved by delta.

        Method "delta": y + dy, linearised before a final softmax or sigmoid (Eq. 3.13). "centered": f(x; w₀ + Θ·delta).
        "stn": f(x; φ₀ + Φ(λ + delta)), with delta added to λ here; gradients reach φ₀ too.

        delta, condition, finish: as in `pushforward` and in `conditioned_output`.
        training: None for the module's own mode.
        update_statistics: whether batch norms count this batch ("stn" in train mode only).
        auxiliary is that of `conditioned_output`, and () in eval mode.
        """
        objective = "linearized" if self.method == "delta" else "trained" if update_statistics else "perturbed"
        kind = GraphKind(objective, self.training if training is None else training)
        if self.method == "stn":
            delta = delta + self.hparams.unconstrained.detach()
        finish = finish or (self._with_auxiliary if kind.training else without_auxiliary)
        return self._run(kind, Inputs(inputs, named), delta, condition, finish)

    def output_at_rest(self, *inputs: object, finish: Finish = unchanged, **named: object) -> Any:
        """finish(the output at λ₀ and w₀, as the hyper step sees it). Gradients reach the weights that respond, no others."""
        self._graphs.follow(self, False)
        kind = GraphKind("at_rest" if self.method == "delta" else "plain", False)
        with frozen(self.named_weights.values(), but=responding(self.response, self.named_weights).values()):
            return self.run(kind, Inputs(inputs, named), finish)

    def _run(self, kind: GraphKind, inputs: Inputs, delta: Tensor, condition: Tensor | None,
             finish: Finish = unchanged) -> Any:  # fmt: skip
        self._graphs.follow(self, kind.training)
        moves = {"delta": delta} if condition is None else {"delta": delta, "condition": condition}
        moved = {name: self.hparams.checked(value, name, inputs) for name, value in moves.items()}
        if any(value.dim() > 1 for value in moved.values()):
            self._graphs.locate_examples(self, inputs)
            if batch_size(inputs) == 1 and not self._graphs.per_example(self, inputs):
                moved = {name: value.flatten() for name, value in moved.items()}  # one example: that of the batch
        with frozen(() if self.method == "stn" else self.named_weights.values()):
            return self.run(kind, inputs, finish, **moved)

    def penalty(self, condition: Tensor | None = None) -> Tensor | float:
        """Σ ½ λ ‖w‖², or λ ‖w‖₁, over the layers with weight decay; 0.0 where no weight decay is tuned.

        condition: None for the penalty at λ₀ and w₀; ε, (h,) or (batch, h), for the mean over the batch at λ₀ + ε and w₀ + Θε.
        """
        if not self.terms.penalties:
            return 0.0
        delta, constant = condition, condition is not None and self.method != "stn"
        if condition is not None and not constant:
            delta = condition + self.hparams.unconstrained.detach()
        strengths, metric = self.hparams(condition), self.decay_metric
        return total_penalty(self.terms.penalties, self.model, self.response, strengths, delta, constant, metric)
