"""A model's own forward takes over the strengths of its network, and is compared with the network's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxstn.frontends.inputs import Inputs, as_inputs
from fxstn.frontends.live.record import record
from fxstn.frontends.model_forwards import condition_modules, restore_modules
from fxstn.frontends.original import run_once
from fxstn.frontends.preservation import Preservation
from fxstn.ir.containers import leaves
from fxstn.ir.generators import forked_rng, reseed
from fxstn.network import SelfTuningNetwork
from fxstn.passes.owners import module_sites


class ForwardDiffersError(ValueError):
    """A model's own forward, at tuned strengths, computes something else than the network that was made of it."""


def condition_model(model: nn.Module, network: SelfTuningNetwork, examples: object) -> Tensor:
    """Let the model of a network draw at λ; returns the values that it reads.

    examples: inputs of the model.

    Raises ForwardDiffersError where its own forward would then compute something else than the network's graph.
    """
    inputs = as_inputs(examples, model)
    plan, strengths = network.recipe.plan, network.hparams().clone()
    rewritable = network.recipe.frontend.rewritable
    graph = network.canonical(True).graph if rewritable else record(model, True, plan.frozen, inputs).graph
    condition_modules(model, module_sites(graph, plan.binding), strengths)
    try:
        _compare(model, network, strengths, inputs)
    except BaseException:
        restore_modules(model)
        raise
    return strengths


def _compare(model: nn.Module, network: SelfTuningNetwork, strengths: Tensor, inputs: Inputs) -> None:
    """Raises ForwardDiffersError where a model's forward and its network's graph differ, but for noise that both have."""
    own = partial(_in_train_mode, model, network.recipe.plan.frozen)
    preserved = Preservation(model, inputs)

    def of_graph(*args: object, **kwargs: Any) -> object:
        return network.conditioned_output(*args, **kwargs)[0]

    if _close(*(_seeded(preserved, run, 0) for run in (own, of_graph))):
        return
    point = network.hparams.unconstrained.detach().clone()
    with torch.no_grad():
        strengths.zero_()
        network.hparams.set({number.name: number.low for number in network.hparams.hyperparameters})
        noise = [not _close(*(_seeded(preserved, run, seed) for seed in (1, 2))) for run in (own, of_graph)]
        network.hparams.unconstrained.copy_(point)
        strengths.copy_(network.hparams())
    live = 'give trace="live", or ' if network.recipe.frontend.rewritable else ""
    elsewhere = f"{live}use fxstn.transform with BilevelRunner"
    if noise == [True, False]:
        raise ForwardDiffersError(
            "the model draws random numbers at rates of its own where its network draws at tuned ones, as in code that torch's "
            f"functions do not see; draw them in a module of the model, or {elsewhere}"
        )
    if not all(noise):
        raise ForwardDiffersError(
            "with tuned strengths the model's own forward computes something else than the network that was made of it; "
            f"{elsewhere}, and report the model"
        )


def _in_train_mode(model: nn.Module, frozen: Sequence[str], *args: object, **kwargs: object) -> object:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            module.training = name not in frozen
        return model(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode


def _seeded(preserved: Preservation[Inputs], run: Callable[..., object], seed: int) -> list[Tensor]:
    """The floating point values that a forward returns when its noise has this seed."""

    def forward(*args: object, **kwargs: object) -> object:
        reseed(seed)
        return run(*args, **kwargs)

    with preserved as inputs, forked_rng():
        output = run_once(forward, inputs)
    return [x.detach() for x in leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)
