"""A model's own forward takes over the strengths of its network, and is compared with the network's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fxstn.frontends.inputs import Inputs, as_inputs
from fxstn.frontends.live.record import record
from fxstn.frontends.model_forwards import condition_modules, restore_modules
from fxstn.frontends.original import run_once
from fxstn.frontends.preservation import Preservation
from fxstn.ir.containers import leaves
from fxstn.ir.graphs import forked_rng
from fxstn.network import SelfTuningNetwork
from fxstn.passes.owners import module_sites


def condition_model(model: nn.Module, network: SelfTuningNetwork, examples: object) -> Tensor:
    """Let the model of a network draw at λ; returns the values that it reads.

    examples: inputs of the model.

    Raises ValueError where its own forward would then compute something else than the network's graph.
    """
    inputs = as_inputs(examples, model)
    plan, strengths = network.recipe.plan, network.hparams().clone()
    rewritable = network.recipe.frontend.rewritable
    graph = network.canonical(True).graph if rewritable else record(model, True, plan.frozen, inputs).graph
    condition_modules(model, module_sites(graph, plan.binding), strengths)
    own, of_graph = partial(_in_train_mode, model, plan.frozen), network.conditioned_output
    preserved = Preservation(model, inputs)
    results = [_seeded(preserved, run, 0) for run in (own, lambda *args, **kwargs: of_graph(*args, **kwargs)[0])]
    if not _close(*results):
        strengths.zero_()
        random = not _close(*(_seeded(preserved, own, seed) for seed in (1, 2)))  # whatever λ is
        strengths.copy_(network.hparams())
        if not random:
            restore_modules(model)
            raise ValueError("with tuned strengths the model's own forward computes something else than the network that was "
                             "made of it; use fxstn.transform with BilevelRunner, and report the model")  # fmt: skip
    return strengths


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
        torch.manual_seed(seed)
        return run(*args, **kwargs)

    with preserved as inputs, forked_rng():
        output = run_once(forward, inputs)
    return [x.detach() for x in leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)
