"""The precision of a loop's own forward, which the tuner's follow."""

from __future__ import annotations

import torch
from torch import nn

from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.tuner import Tuner
from fxstn.frontends.conditioned import ConditionedForward


def follow_autocast(tuner: Tuner, model: nn.Module) -> None:
    """Use the precision of the model's last training forward, unless the settings name one."""
    forward = vars(model).get("forward")
    if tuner.settings.execution.autocast is None and isinstance(forward, ConditionedForward):
        tuner.autocast = forward.autocast
        if tuner.autocast is torch.float16 and not tuner.updates.scalers["hyper_loss"].enabled:
            tuner.updates.scalers = {name: LossScaler(tuner.device, True) for name in tuner.updates.scalers}
