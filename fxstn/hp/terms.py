"""What the training objectives have besides loss_fn(output, target): penalties, and what graphs say beside their output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Auxiliary:
    """Mixed into a spec whose sites tell the training objectives a value of the graph besides the output.

    In the response step the values are linearised as the output is: h + dh.
    """

    def retarget(self, target: Any, output: Any, value: Any) -> Any:
        """The target that the loss gets in place of `target`."""
        return target

    def penalty(self, value: Any) -> Tensor | float:
        """A scalar, the mean over the batch, that is added to the loss."""
        return 0.0


@dataclass(frozen=True)
class LossTerms:
    """penalties: (parameter name, index of its weight decay, norm). auxiliary: the specs behind the values that graphs return
    beside their output, in the order they act. jacobian: (index of the coefficient, number of projections or None)."""

    penalties: tuple[tuple[str, int, int], ...]
    auxiliary: tuple[Auxiliary, ...]
    jacobian: tuple[tuple[int, int | None], ...]
