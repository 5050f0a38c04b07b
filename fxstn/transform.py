"""fxstn.transform: the list of passes, on one screen. Read this first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxstn.frontends.decompositions.torchvision import AUGMENTING
from fxstn.frontends.export import InputSpec, follow_by_export
from fxstn.frontends.guards import frozen_modules, refuse_wrapped
from fxstn.frontends.live.graph import LiveRecipe, addresses
from fxstn.frontends.live.record import record
from fxstn.frontends.symbolic import trace as trace_module
from fxstn.hp import Dropout, HyperparameterSpace, Spec
from fxstn.hp.binding import Binding
from fxstn.ir.errors import Diagnostic, TransformError
from fxstn.ir.input_errors import explained_errors
from fxstn.network import METHODS, SelfTuningNetwork
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.condition import condition
from fxstn.passes.example_axes import Layouts, layouts
from fxstn.passes.hyperize import hyperize, response_modules, responses
from fxstn.passes.match import bind
from fxstn.passes.pushforward import linearized, normalise_by_batch, perturbed, pushforward, trained
from fxstn.passes.recompute import recompute as recompute_pass
from fxstn.passes.simplify import simplify

FRONTENDS = ("fx", "export", "live")  # in the order that "auto" tries them
# Each graph is made from the conditioned training graph or the evaluation graph by one last pass.
LAST_PASS: dict[str, Callable[[fx.GraphModule, Layouts], fx.GraphModule]] = {
    "pushforward": pushforward,
    "perturbed": perturbed,
    "trained": trained,
}


def followed(
    model: nn.Module, training: bool, frozen: Collection[str], examples: InputSpec | None = None, frontend: str = "fx"
) -> fx.GraphModule:
    """trace → canonicalize, by frontend "fx" or "export"."""
    if frontend == "export":
        assert examples is not None
        return canonicalize(follow_by_export(model, training, frozen, examples))
    return canonicalize(trace_module(model, training, frozen, len(examples.inputs) if examples else 0))


@dataclass(frozen=True)
class Recipe:
    """What the passes need besides the modules themselves to build a graph, and to build it again after a copy.

    binding: which λ belongs where. frozen: modules that stay in eval mode. examples, frontend: how the forward is followed.
    recompute: whether the response and hyper steps keep their activations or compute them again. statistics: what batch
    norms normalise by in these steps, "batch" or "running".
    """

    binding: Binding
    frozen: tuple[str, ...]
    examples: InputSpec | None
    frontend: str
    recompute: bool = False
    statistics: str = "batch"

    def canonical(self, root: nn.Module, training: bool) -> fx.GraphModule:
        """The graph of root's child `model` in one mode, with the children `hparams` and `response` beside it."""
        graph = followed(root.get_submodule("model"), training, self.frozen, self.examples, self.frontend)
        return with_children(graph, root)

    def emit(self, canonical: fx.GraphModule, name: str, places: Layouts) -> fx.GraphModule:
        """Build one graph by name: "train", "eval", "pushforward", or those of the training objectives, "general",
        "linearized", "perturbed", "trained", which return the auxiliary too; all but the first and last also with "_eval".

        The passes, in order: (trace → canonicalize →) condition → hyperize → pushforward or a sibling → simplify
        (→ recompute).
        places: where the examples are, from `layouts`; empty for a plain batch.
        """
        kind = name.removesuffix("_eval")
        auxiliary = kind not in ("train", "pushforward")
        graph = condition(canonical, None if name.endswith("eval") else self.binding, places, auxiliary)
        if kind == "linearized":
            if name.endswith("eval") and self.statistics == "batch":
                graph = normalise_by_batch(graph, self.frozen)
            graph = simplify(linearized(hyperize(graph), places, self.statistics == "running"))
            return recompute_pass(graph) if self.recompute else graph
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
    response: str | None = None,
    trace: str = "auto",
    recompute: bool = False,
    statistics: str = "batch",
) -> SelfTuningNetwork:
    """Compile a model into one that can tune its own regularisation while it trains (Bae & Grosse 2020).

    model: any module that one of the ways below can follow; it is copied, not modified, and keeps its weights. hparams: a
    list of specs from `fxstn.hp`; None tunes every dropout, stochastic depth and augmentation found, starting at its own
    strength moved just inside the range, or, where the model has none, inserts dropout at the input and after each
    top-level stage but the last.
    example_inputs: a tensor or a tuple of them; when given, every graph is run once on it, so that whatever fails does
    so here. Inputs with a constant default (`mask=None`) keep it unless example_inputs supplies them. method: "delta"
    (Δ-STN: centred, separate objectives, linearised), "centered" (without linearisation) or "stn" (MacKay et al. 2019:
    uncentred, one objective). response: what the weights can do when λ moves by δ. "scaled": (1 + U δ) ⊙ w, every unit
    is scaled; little to learn, so that it is learned soon. "structured": w + (U δ) ⊙ R with R learned too (the paper, Eq.
    3.14), which takes many times the examples. None: "scaled" for method "delta", "structured" for the others.
    trace: how the forward is followed. "fx": symbolic tracing. "export": torch.export, where Python may branch on sizes, and
    later inputs have those of the examples, dimension 0 aside. "live": the forward runs as it is, whatever its Python does,
    with tangents carried beside it, and one perturbation for the whole batch. The last two need example_inputs. "auto": the
    first that works; `frontend` of the network tells which, `rejected` why not those before.
    recompute: activation checkpointing for the response and hyper steps of method "delta": their activations are computed
    again in the backward pass, which costs time and saves memory in deep networks; not for "live". statistics: what batch
    norms normalise by in the response and hyper steps of method "delta": those of the "batch", as while w₀ is trained, or
    the "running" ones, as for any user of the trained network, which lag behind the weights; not for "live" either.

    Modules in eval mode while the model is in train mode (a frozen batch norm) stay frozen. nn.SyncBatchNorm normalises over
    all processes, on any device (docs/distributed.md).

    Raises TransformError, with every problem at once, where the model cannot be followed; ValueError for a spec that
    matches nothing, a start outside its range, two hyperparameters of one name, nothing to tune, an unknown method, example
    inputs that the model cannot take, a model wrapped for several processes; TypeError for a model, hparams or example_inputs
    of another kind. Warns where hparams=None leaves an augmentation of the model at its own strength, because the model is
    not followed by "fx".
    """
    if not isinstance(model, nn.Module) or isinstance(model, SelfTuningNetwork):
        raise TypeError(
            f"model must be an nn.Module that is not transformed yet, got {model if isinstance(model, type) else type(model)}; "
            "give the plain model, with its weights"
        )
    if example_inputs is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(example_inputs)):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of them, got {type(example_inputs).__name__}; take the inputs of a "
            "batch, next(iter(loader))[0]"
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if response not in (None, "scaled", "structured") or (response == "scaled" and method == "stn"):
        raise ValueError(f"response={response!r} is neither 'scaled' (not for method 'stn') nor 'structured'")
    if trace not in ("auto", *FRONTENDS):
        raise ValueError(f"trace={trace!r} is not one of auto, {', '.join(FRONTENDS)}")
    if statistics not in ("batch", "running"):
        raise ValueError(f"statistics={statistics!r} is neither 'batch' nor 'running'")
    graphs_only = recompute or statistics != "batch"
    if graphs_only and (method != "delta" or trace == "live"):
        what = "recompute=True" if recompute else f"statistics={statistics!r}"
        raise ValueError(f"{what} is for method 'delta', traced by fx or export; got {method!r} and {trace!r}")
    if trace in ("export", "live") and example_inputs is None:
        raise ValueError(f"trace={trace!r} needs example_inputs")
    refuse_wrapped(model)
    model = copy.deepcopy(model)
    tried: Sequence[str] = (trace,) if trace != "auto" else FRONTENDS if example_inputs is not None else FRONTENDS[:1]
    emission = {"recompute": recompute, "statistics": statistics}
    structured = response == "structured" or (response is None and method != "delta")
    frontends = [frontend for frontend in tried if not (graphs_only and frontend == "live")]
    problems: list[Diagnostic] = []
    for frontend in frontends:
        try:
            network = _transformed(frontend, model, hparams, example_inputs, method, structured, emission)
            network.frontend, network.rejected = frontend, tuple(problems)
            found = [name for name, module in model.named_modules() if type(module) in AUGMENTING]
            network.augments = frontend != "live" and bool(found)
            if found and hparams is None and frontend != "fx":
                warnings.warn(
                    f"the augmentation '{found[0]}' keeps its strength: it is tuned where symbolic tracing follows the "
                    f"model, and this one is followed by trace={frontend!r}; on 'export' a spec such as hp.ColorJitter() "
                    "inserts one that is tuned", stacklevel=2,
                )  # fmt: skip
            return network
        except TransformError as error:
            problems += [
                replace(problem, frontend=frontend if len(frontends) > 1 else "") for problem in error.problems
            ]
    if trace == "auto" and example_inputs is None:
        more = "; or give example_inputs: then torch.export, and after it the forward as it is, are tried"
        problems = [replace(problem, remedy=problem.remedy + more) for problem in problems]
    raise TransformError(problems)


def _transformed(
    frontend: str,
    model: nn.Module,
    hparams: Sequence[Spec] | None,
    example_inputs: Any,
    method: str,
    structured: bool,
    emission: dict[str, Any],
) -> SelfTuningNetwork:
    """A network by one way of following the forward. Raises as `transform`."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    frozen = tuple(sorted(frozen_modules(model)))
    graphs = canonical_graphs(frontend, model, frozen, example_inputs)
    binding = bind(graphs[0], hparams)
    space = HyperparameterSpace(binding.hyperparameters)
    found = responses(graphs, structured)
    if not found.axes:
        raise ValueError(
            "no parameter can respond to the hyperparameters: the model has no trainable linear or convolution layer "
            "whose parameters it uses directly"
            + ("" if structured else ", and whose scale no batch norm takes away")
            + "; fxstn.explain(model) lists why"
        )
    reference = next(model.parameters())
    space.to(device=reference.device, dtype=reference.dtype)
    recipe: Any = Recipe(binding, frozen, InputSpec.of(model, example_inputs), frontend, **emission)
    if frontend == "live":
        if binding.dropped or binding.terms.jacobian or any(type(site.spec) is not Dropout for site in binding.sites):
            raise TransformError(
                [Diagnostic("", "an operation other than dropout, which needs a graph,", "", "use hp.Dropout")]
            )
        recipe = LiveRecipe(binding, frozen, addresses(graphs[0], binding))
    modules = response_modules(model, found, len(space), structured)
    network = SelfTuningNetwork(model, modules, space, binding.terms, method, recipe)
    if frontend != "live":
        for training, graph in zip((True, False), graphs, strict=True):
            network.keep_canonical(training, with_children(graph, network))
    for name in ("train", "eval", "pushforward", "pushforward_eval"):
        network.graph(name)
    if example_inputs is not None:
        with explained_errors((inputs, None), "example_inputs", model):
            network.check(*inputs)
    return network


def canonical_graphs(frontend: str, model: nn.Module, frozen: tuple[str, ...], example_inputs: Any) -> list[Any]:
    """The model's training and evaluation graph by one way of following it, as far as passes need them to decide."""
    if frontend == "live":
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        return [record(model, training, frozen, inputs) for training in (True, False)]
    examples = InputSpec.of(model, example_inputs)
    return [followed(model, training, frozen, examples, frontend) for training in (True, False)]
