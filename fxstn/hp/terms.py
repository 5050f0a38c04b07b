"""Penalty terms of the training loss, and values that graphs return beside the output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Auxiliary:
    """Mixed into a spec whose sites return a value to the training objectives, beside the graph's output.

    In the response step the value is linearised as the output is: h + dh.
    """

    def __repr__(self) -> str:
        return "hp.Auxiliary()" if type(self) is Auxiliary else super().__repr__()

    def retarget(self, target: object, output: object, value: tuple[Tensor, ...]) -> object:
        """The target that the loss gets in place of `target`.

        output: of the network, (batch, ...).
        value: what the site returned, tensors (batch, ...).
        """
        return target

    def penalty(self, value: tuple[Tensor, ...]) -> Tensor | float:
        """What is added to the loss: a scalar, the mean over the batch. value: what the site returned."""
        return 0.0


@dataclass(frozen=True)
class LossTerms:
    """Terms of the training objectives besides the loss of the output.

    penalties: (parameter name, index of its weight decay, norm).
    auxiliary: the specs of the values that graphs return beside their output, in the order they act.
    jacobian: (index of the coefficient, number of projections or None).
    """

    penalties: tuple[tuple[str, int, int], ...]
    auxiliary: tuple[Auxiliary, ...]
    jacobian: tuple[tuple[int, int | None], ...]
