"""The response loss by other means than the emitted graph: what the benchmarks compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from fxstn.network import SelfTuningNetwork
from fxstn.ops.response import frozen, parameter_changes


def func_jvp_per_example(stn: SelfTuningNetwork, x: Tensor, target: Tensor) -> Tensor:
    """With one ε per example: torch.func.jvp with respect to δ, at δ = 0, of the network with hyperlayers."""
    epsilon = stn.hparams.sample(len(x)).detach()
    graph = stn.graph("perturbed")  # batch statistics recomputed, none updated: torch.func.jvp refuses the update
    with frozen(stn.general_parameters()):
        duals = torch.func.jvp(
            lambda delta: graph(x, condition=epsilon, delta=delta), (torch.zeros_like(epsilon),), (epsilon,)
        )
    return F.cross_entropy(duals[0] + duals[1], target)


def without_statistics(model: nn.Module) -> nn.Module:
    """Puts a model into train mode and takes the running statistics of its batch norms away; in place."""
    for module in model.train().modules():
        if isinstance(module, _NormBase):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return model


def _weights_and_tangents(stn: SelfTuningNetwork, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model by name, detached, and Θε of each."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with frozen(stn.general_parameters()):
        changes = parameter_changes(stn.response, stn.model, stn.hparams.sample(1)[0].detach())
    return weights, {name: changes.get(name, torch.zeros_like(weight)) for name, weight in weights.items()}


def func_jvp_per_batch(stn: SelfTuningNetwork, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """With one ε for the batch: Θε is materialised, and torch.func.jvp runs the original network."""
    weights, tangents = _weights_and_tangents(stn, model)
    duals = torch.func.jvp(lambda w: functional_call(model, w, (x,)), (weights,), (tangents,))
    return F.cross_entropy(duals[0] + duals[1], target)


def double_backward(stn: SelfTuningNetwork, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """With one ε for the batch, by two backward passes: Jᵀu is linear in u, and its transpose maps Θε to J Θε."""
    weights, tangents = _weights_and_tangents(stn, model)
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    y = functional_call(model, leaves, (x,))
    u = torch.zeros_like(y, requires_grad=True)
    transposed = torch.autograd.grad(y, list(leaves.values()), u, create_graph=True)
    (dy,) = torch.autograd.grad(transposed, u, list(tangents.values()), create_graph=True)
    return F.cross_entropy(y.detach() + dy, target)
