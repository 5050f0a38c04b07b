"""The precision and the mode of a loop's own forward, which the tuner's follow."""

from __future__ import annotations

import torch
from torch import nn

from fxstn.bilevel.scaling import LossScaler
from fxstn.bilevel.state import State
from fxstn.bilevel.tuner import Tuner
from fxstn.frontends.conditioned import ConditionedForward


class LastForward:
    """The model's last forward of the loop. Its precision is the tuner's unless the settings name one.

    A part with a state: where a loop goes on after the last step of an epoch, the epoch is evaluated before there is another
    forward.
    """

    def __init__(self, tuner: Tuner, model: nn.Module) -> None:
        self.tuner, self.model = tuner, model
        self._earlier = 0  # forwards of the model before `follow`

    @property
    def _forward(self) -> ConditionedForward | None:
        forward = vars(self.model).get("forward")
        return forward if isinstance(forward, ConditionedForward) else None

    @property
    def training(self) -> bool:
        """Whether the last forward that can be differentiated was in train mode: the model may be in eval mode since then."""
        forward = self._forward
        return self.model.training if forward is None or forward.trained is None else forward.trained

    @property
    def forwards(self) -> int:
        """The number of forwards in train mode since `follow`."""
        return max(0, self.all_forwards() - self._earlier)

    def all_forwards(self) -> int:
        """The number of forwards in train mode so far."""
        return 0 if self._forward is None else self._forward.forwards

    @property
    def calls(self) -> int:
        """The number of forwards so far, in any mode."""
        return 0 if self._forward is None else self._forward.calls

    def follow(self) -> None:
        """Use the precision that the model's last forward in train mode had. It is the last of a step."""
        if (forward := self._forward) is not None:
            self._earlier = forward.forwards
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
