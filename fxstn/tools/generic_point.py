"""A point at which a derivative can be checked: no weight is at a special value, and few values are near a kink."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fxstn.frontends.inputs import Inputs
from fxstn.frontends.original import plain_copy, run_once
from fxstn.frontends.preservation import Preservation
from fxstn.network import SelfTuningNetwork
from fxstn.ops.precision import inexact
from fxstn.ops.response import Response
from fxstn.tools.reference import as_double

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def generic_copy(model: nn.Module, inputs: Inputs, seed: int) -> nn.Module:
    """A float64 copy with constant parameters shifted a little, and the running statistics of one forward.

    After the first seed, biases of norms are shifted by three standard deviations too, up or down: then few of the values
    that a ReLU after them gets are near its kink.
    """
    model = plain_copy(model)._apply(as_double)
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    momenta = [module.momentum for module in norms]
    modes = [module.training for module in model.modules()]
    with torch.no_grad(), Preservation(nn.Module(), inputs) as inputs:
        for module in model.modules() if seed else ():
            if isinstance(module, NORMS) and module.bias is not None:
                module.bias.add_(3 * _drawn(module.bias, generator).sign())
        for parameter in filter(inexact, model.parameters()):
            if (parameter == parameter.flatten()[0]).all():  # norm affines, a head that starts at zero
                parameter.add_(0.1 * _drawn(parameter, generator))
        for module in norms:
            module.momentum = 1.0
        run_once(model.train(), inputs)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    for child, mode in zip(model.modules(), modes, strict=True):
        child.training = mode
    return model


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers from a generator of the CPU, for a tensor on any device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def randomize_response(network: SelfTuningNetwork, seed: int) -> Tensor:
    """Give every response random weights, so that every weight of the model moves.

    Returns a random delta of unit length, (h,).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.response.modules():
            if isinstance(module, Response):
                module.U.copy_(0.05 * torch.randn(module.U.shape, generator=generator))
    delta = torch.randn(len(network.hparams), generator=generator).to(network.hparams.unconstrained)
    return delta / delta.norm()
