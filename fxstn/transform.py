"""fxstn.transform: the list of passes, on one screen. Read this first."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from fxstn.frontends.decompositions.recognition import recognise_dropout
from fxstn.frontends.export import Export
from fxstn.frontends.guards import frozen_modules
from fxstn.frontends.interface import Frontend, Pass
from fxstn.frontends.layer_trial import recognise_layer_drop, varying_modules
from fxstn.frontends.live.frontend import Live
from fxstn.frontends.original import check_inputs, hooked_parameters, plain_copy
from fxstn.frontends.selection import first_that_works, with_remedy
from fxstn.frontends.symbolic import Symbolic
from fxstn.hp import Spec
from fxstn.ir.collector import paused_collector
from fxstn.ir.errors import TransformError
from fxstn.network import SelfTuningNetwork
from fxstn.passes.build import augmentation, build_network
from fxstn.passes.condition import condition
from fxstn.passes.counters import join_counters
from fxstn.passes.hyperize import hyperize
from fxstn.passes.join_shifts import join_shifts
from fxstn.passes.join_terms import join_terms
from fxstn.passes.keep_precision import keep_precision
from fxstn.passes.linearized import linearized
from fxstn.passes.lower_weights import lower_weights
from fxstn.passes.output_types import restore_types
from fxstn.passes.pushforward import perturbed, pushforward
from fxstn.passes.recompute import recompute as recompute_pass
from fxstn.passes.request import Request, check_model
from fxstn.passes.simplify import simplify
from fxstn.passes.statistics import choose_statistics, hold_statistics

# How a forward is followed, in the order that trace="auto" tries: nn.Module → graph, which `canonicalize` respells.
FRONTENDS: tuple[type[Frontend], ...] = (Symbolic, Export, Live)

# What makes each graph from the canonical one, by the objective that it serves (`fxstn.ir.graph_kind.GraphKind`).
PIPELINES: Mapping[str, tuple[Pass, ...]] = {
    "plain": (condition, restore_types, simplify, keep_precision, join_counters),
    "general": (condition, restore_types, simplify, keep_precision, join_counters),
    "pushforward": (condition, hyperize, hold_statistics, pushforward, restore_types, simplify, keep_precision),
    "linearized": (condition, choose_statistics, hyperize, hold_statistics, linearized, join_shifts, lower_weights,
                   join_terms, restore_types, simplify, keep_precision, recompute_pass),
    "at_rest": (condition, choose_statistics, hold_statistics, restore_types, simplify, keep_precision, recompute_pass),
    "perturbed": (condition, hyperize, hold_statistics, perturbed, restore_types, simplify, keep_precision),
    "trained": (condition, hyperize, perturbed, restore_types, simplify, keep_precision, join_counters),
}  # fmt: skip


FEW = 0.5  # of the elements of weights, below which transform warns


def transform(
    model: nn.Module,
    hparams: Sequence[Spec] | None = None,
    *,
    example_inputs: object = None,
    method: str = "delta",
    response: str | None = None,
    trace: str = "auto",
    recompute: bool = False,
    statistics: str = "batch",
) -> SelfTuningNetwork:
    """Compile a model into one that can tune its own regularisation while it trains (Bae & Grosse 2020).

    model: any module that a frontend can follow. It is copied, not modified, and keeps its weights.
    hparams: a list of specs from `fxstn.hp`: what to tune. None tunes every dropout, stochastic depth and augmentation of the
        model. Each starts at its own strength, moved inside the range where it is at an end, or where it is off, at 0, as the
        usual recipe has it (dropout: 0.1). Where the model has none of these, None inserts dropout at the input and after each
        top-level stage but the last. `print(stn.hparams)` says where each starts, and why.
    example_inputs: a tensor, a tuple of inputs by position, or a dict of inputs by name. A dict of which no key is a name in
        the forward is one input. Every graph runs once on them, so that whatever fails does so here: the training graph on
        their values, the others on their sizes and types, where these say enough. The inputs stay as they are. Inputs with a
        constant default (`mask=None`) keep it unless example_inputs supplies them.
    method: "delta" (Δ-STN: centred, separate objectives, linearised), "centered" (without linearisation) or "stn" (MacKay et
        al. 2019: uncentred, one objective).
    response: how the weights change when λ moves by δ. "scaled": (1 + U δ) ⊙ w scales every unit; only U is learned, from few
        examples. "structured": w + (U δ) ⊙ R (the paper, Eq. 3.14); R is learned too, and needs many times more examples.
        None: "scaled" for method "delta", "structured" for the others.
    trace: which frontend follows the forward. "fx": symbolic tracing. "export": torch.export; Python may branch on sizes.
        The sizes of later inputs may differ: the forward is exported anew where it does something else for them, or ValueError
        says which sizes it takes. "live": the forward runs as it is, whatever its Python does, and computes the tangents beside
        the values.
        "export" and "live" need example_inputs. "auto": the first that works. `frontend` of the network names it; `rejected`
        says why the ones before did not work.
    recompute: True computes the activations of the response and hyper steps again in the backward pass (activation
        checkpointing). This costs time and saves memory in deep networks. It raises ValueError for methods other than "delta"
        and for trace="live"; "auto" does not try "live" then.
    statistics: which statistics batch norms use in the response and hyper steps of method "delta". "batch": those of the batch,
        as while w₀ is trained. "running": the running ones, as for any user of the trained network; they lag behind the
        weights. "running" raises ValueError where recompute does.

    Modules in eval mode while the model is in train mode (a frozen batch norm) stay frozen. nn.SyncBatchNorm normalises over
    all processes, on any device (docs/guides/distributed.md).

    Raises TransformError, with the problems of every frontend at once, where none can follow the model. Raises ValueError for
    a spec that matches nothing, a start outside its range, two hyperparameters of one name, nothing to tune, an unknown
    method, example inputs that the model cannot take, a model wrapped for several processes. Raises TypeError for a model,
    hparams or example_inputs of another kind. Warns where hparams=None leaves an augmentation of the model at its own
    strength, where less than half of the elements of weights respond, and where a parameter of the model has a hook on its
    gradient, which the copy does not have.
    """
    check_model(model)
    request = Request(hparams, example_inputs, method, response, trace, recompute, statistics, FRONTENDS)
    if names := hooked_parameters(model):
        which = f"{', '.join(map(repr, names[:3]))}{' and others' if len(names) > 3 else ''}"
        warnings.warn(
            f"the hooks on the gradients of {which} stay with this model, and the network trains a copy; register them on its "
            f"parameters, stn.model.get_parameter({names[0]!r}).register_hook(...)",
            stacklevel=2,
        )
    return network_over(plain_copy(model), request)


def network_over(model: nn.Module, request: Request) -> SelfTuningNetwork:
    """What `transform` returns, over the very modules of a model."""
    recognise_dropout(model)
    inputs = request.inputs_of(model)
    recognise_layer_drop(model, inputs)
    try:
        with paused_collector():
            network, rejected = first_that_works(
                request.candidates, lambda frontend: build_network(frontend, model, request, PIPELINES)
            )
    except TransformError as error:
        if inputs is not None:
            check_inputs(model, frozen_modules(model), inputs)
        unguided = request.trace == "auto" and inputs is None
        raise with_remedy(error) if unguided else error from error.__cause__
    network.rejected = rejected
    if network.coverage.share < FEW:
        warnings.warn(
            f"{network.coverage}: the training of the others does not follow λ. The largest: {network.coverage.named()}. "
            "fxstn.explain lists all",
            stacklevel=3,
        )
    if network.frontend == "live" and inputs is not None and (varying := varying_modules(model, inputs)):
        warnings.warn(
            f"the forward calls {', '.join(map(repr, varying[:3]))} for some random draws and not for others: that randomness "
            "keeps its strength, and dropouts that the example run skipped are not tuned; draw a mask with torch in its place, "
            "or switch it off",
            stacklevel=3,
        )
    sites = {site.path for site in network.recipe.plan.binding.sites}
    if request.hparams is None and (path := augmentation(model, but=sites)) is not None:
        reason = f", because {rejected[0]}" if rejected else ""
        warnings.warn(
            f"the augmentation '{path}' keeps its strength: no operation of fxstn does what it does{reason}",
            stacklevel=2,
        )
    return network
