"""ε, by which the response and the hyper step perturb λ: one for each example, or one for a batch."""

from __future__ import annotations

from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.checks import remark_on
from fxstn.frontends.inputs import Inputs, as_inputs
from fxstn.frontends.interface import Graph
from fxstn.network import SelfTuningNetwork
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.synced import BATCH_NORMS

PerturbMode = Literal["auto", "example", "batch", "off"]
Perturb = PerturbMode | Tensor
_joining: WeakKeyDictionary[Graph, bool] = WeakKeyDictionary()


def inputs_of(stn: SelfTuningNetwork, inputs: object) -> Inputs:
    """The inputs of a batch: a tuple or list of them by position, a mapping by name, or the one input."""
    return as_inputs(tuple(inputs) if isinstance(inputs, list) else inputs, stn.model)


def joins_examples(stn: SelfTuningNetwork) -> bool:
    """Whether a batch norm normalises by the batch in the response step.

    Statistics of examples with an ε each follow none of them. Θ then learns to undo what they undo where all have the same λ.
    """
    graph = stn.graph("train")
    if graph not in _joining:
        calls = [node for kind in BATCH_NORMS for node in graph.graph.find_nodes(op="call_function", target=kind)]
        norms = [node for node in calls if node.args[5] is True]
        no_running_mean = any(node.args[1] is None for node in norms)
        _joining[graph] = no_running_mean or (bool(norms) and stn.recipe.plan.statistics == "batch")
    return _joining[graph]


def perturbation(
    stn: SelfTuningNetwork, inputs: object, perturb: Perturb, generator: torch.Generator | None = None
) -> Tensor:
    """ε of a step.

    perturb: "example" draws one ε per example, (batch, h), and "batch" one for all examples, (h,). "auto" draws one per example
        where the network allows, and no batch norm joins the examples. Or ε itself, in one of the two shapes.
    generator: that all processes have in the same state. Each then takes its share of the rows, every k-th of k processes, as
        torch's DistributedSampler shares out examples. None: torch's own, for the rows of this process.

    Raises ValueError for anything else.
    """
    inputs = inputs_of(stn, inputs)
    if isinstance(perturb, Tensor):
        return perturb
    if perturb not in ("auto", "example", "batch"):
        raise ValueError(f"perturb={perturb!r} must be 'auto', 'example', 'batch' or a tensor{remark_on(perturb)}")
    possible = perturb != "batch" and stn.per_example(
        *inputs.args, **inputs.kwargs
    )  # says also which λ have one ε alone
    if perturb == "batch" or (perturb == "auto" and (not possible or joins_examples(stn))):
        return stn.hparams.sample(1, generator)[0]
    shares = 1 if generator is None else distributed.processes()
    return stn.hparams.sample(batch_size(inputs) * shares, generator)[distributed.rank() % shares :: shares]
