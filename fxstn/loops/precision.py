"""The precision of a loop's own forward, which the tuner's follow."""

from __future__ import annotations

import torch
from torch import nn

from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.state import State
from fxstn.bilevel.tuner import Tuner
from fxstn.frontends.conditioned import ConditionedForward


class FollowedPrecision:
    """The precision of the model's last training forward, which a tuner uses unless its settings name one. A part with a state:
    where a loop goes on after the last step of an epoch, the epoch is evaluated before there is another forward."""

    def __init__(self, tuner: Tuner, model: nn.Module) -> None:
        self.tuner, self.model = tuner, model

    def follow(self) -> None:
        """Use the precision that the model's last training forward had."""
        forward = vars(self.model).get("forward")
        if isinstance(forward, ConditionedForward):
            self._use(forward.autocast)

    def _use(self, autocast: torch.dtype | None) -> None:
        """autocast: the type of a forward under autocast. None: it was off."""
        tuner = self.tuner
        if tuner.settings.execution.autocast is not None:
            return
        tuner.autocast = autocast
        if autocast is torch.float16 and not tuner.updates.scalers["hyper_loss"].enabled:
            tuner.updates.scalers = {name: LossScaler(tuner.device, True) for name in tuner.updates.scalers}

    def state_dict(self) -> State:
        return {"autocast": self.tuner.autocast}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; to be called before the scales of losses in float16 are loaded."""
        self._use(state["autocast"])
