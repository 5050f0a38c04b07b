"""The loss scale of float16: each objective has its own, so that its gradients neither overflow nor vanish."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxstn.bilevel import distributed
from fxstn.bilevel.state import State

MOST_OVERFLOWS = 30  # in a row: the scale has then fallen from 2¹⁶ to 2⁻¹⁴, and a lower one does not help


class _Probe:
    """What a GradScaler takes for an optimizer. Its step notes that all gradients are finite.

    optimizers: those with the gradients.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.finite = False

    def step(self) -> None:
        self.finite = True

    def has_gradients(self) -> bool:
        return any(parameter.grad is not None for group in self.param_groups for parameter in group["params"])


class LossScaler:
    """The scale of one objective's loss, and which of its steps overflow.

    device: of the run.
    enabled: False leaves losses and gradients as they are, and looks for no overflow.

    It is torch's GradScaler, except that an overflow halves the scale only where a lower scale can help:

    - A loss that is itself no number leaves the scale as it is.
    - At a scale of 1 or less, only the second overflow in a row counts.

    Otherwise overflows with another cause, such as one odd batch in fifty, would lower the scale until all gradients vanish.
    `overflows` is the number of steps in a row, up to the last one, that overflowed.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self.device, self.enabled, self.overflows = device, self._scaler.is_enabled(), 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss whose gradients fit."""
        return self._scaler.scale(loss)

    def get_scale(self) -> float:
        """1.0 where losses are not scaled."""
        return self._scaler.get_scale()

    def unscale(self, optimizers: Iterable[Optimizer], loss: Tensor) -> bool:
        """Bring the gradients of a scaled loss to their true size. False where one of them overflowed: nothing may read them.

        optimizers: of all parameters that the loss trains. Their gradients are the same in all processes.
        loss: as it was before the scale.
        """
        probe = _Probe(optimizers)
        if not self.enabled or not probe.has_gradients():
            return True
        self._scaler.step(probe)  # type: ignore[arg-type]
        self.overflows = 0 if probe.finite else self.overflows + 1
        self._scaler.set_backoff_factor(0.5 if probe.finite or self._too_large(loss) else 1.0)
        self._scaler.update()
        return probe.finite

    def _too_large(self, loss: Tensor) -> bool:
        """Whether an overflow speaks against the scale."""
        no_number = distributed.any_process(not torch.isfinite(loss).item(), self.device)
        return not no_number and (self.get_scale() > 1 or self.overflows > 1)

    def state_dict(self) -> State:
        """Empty where losses are not scaled."""
        return self._scaler.state_dict() | {"overflows": self.overflows} if self.enabled else {}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; from the first scale where the run before scaled no losses."""
        if self.enabled and state:
            self._scaler.load_state_dict(state)
            self.overflows = state["overflows"]


def overflows(optimizer: Optimizer) -> bool:
    """Whether a GradScaler of the user's has told an optimizer to leave out the step that it is called for."""
    infinite = getattr(optimizer, "found_inf", None)
    return infinite is not None and bool(infinite.item())
