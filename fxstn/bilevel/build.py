"""The optimizers of a run, with what is between a backward pass and their steps."""

from __future__ import annotations

import torch

from fxstn.bilevel.checks import check_no_float16
from fxstn.bilevel.optimizers import OptimizerLike, build_optimizers
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.run_settings import Settings
from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.updates import Updates
from fxstn.network import SelfTuningNetwork


def build_updates(
    problem: BilevelProblem,
    network: SelfTuningNetwork | None,
    settings: Settings,
    device: torch.device,
    weights: bool = True,
) -> Updates:
    """The optimizers of a run, and what is between a backward pass and their steps.

    network: of the problem. None: a problem of the user's own.
    weights: whether w₀ has one of them; False where somebody else steps w₀.

    Raises ValueError where float16 autocast would have to scale gradients that are in float16 themselves.
    """
    choices: dict[str, OptimizerLike] = {"optimizer": settings.optimizer} if weights else {}
    choices |= {
        "response.optimizer": settings.response.optimizer,
        "hyper.optimizer": settings.hyper.optimizer,
        "hyper.scale_optimizer": settings.hyper.scale_optimizer,
    }
    optimizers = build_optimizers(problem, choices, network is not None and network.structured)
    scaled = settings.execution.autocast is torch.float16
    if scaled:
        check_no_float16(network.model if network is not None else problem)
    scalers = {name: LossScaler(device, scaled) for name in ("train_loss", "response_loss", "hyper_loss")}
    schedulers, step_schedulers = settings.schedulers, settings.step_schedulers
    return Updates(optimizers, schedulers, step_schedulers, settings.clip_norm, scalers, check=network is None)


def double_decay(updates: Updates, network: SelfTuningNetwork | None) -> list[str]:
    """Warnings of optimizers that decay weights whose decay is tuned."""
    if network is None or not network.terms.penalties:
        return []
    return [
        f"weight decay is tuned and also set in {name}: both act; set weight_decay=0 there, which is 0.01 by default in "
        "torch.optim.AdamW, or give hparams without hp.WeightDecay"
        for name in ("optimizer", "response.optimizer")
        if name in updates.optimizers and any(g.get("weight_decay") for g in updates.optimizers[name].param_groups)
    ]
