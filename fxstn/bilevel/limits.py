"""What the generalisation gap says of λ: how far a stronger regularisation can pay, and how likely it is to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxstn.bilevel.problem import BilevelProblem


def limit(optimizer: torch.optim.Optimizer, regularizing: Sequence[bool], train: float, valid: float) -> None:
    """Set the group's "gap" of a `SettlingAdam` from the losses on training and on validation data, both without dropout.

    A stronger regularisation does not fit the training data better, so at best L_V comes down to L_T: by the generalisation
    gap's share (L_V − L_T)/L_V, 0 where L_T is above L_V. The larger it is, the likelier a step up is to pay, and the smaller,
    the likelier a step down. It is set for numbers which regularise more where they are higher, NaN for the others. Losses that
    are not finite, below zero, or a validation loss of zero say nothing: then all are NaN.
    regularizing: for each number of λ. Optimizers without "gap" stay as they are.
    """
    known = 0 <= train < math.inf and 0 < valid < math.inf
    share = min(max(1 - train / valid, 0.0), 1.0) if known else math.nan
    for group in optimizer.param_groups:
        if "gap" in group:
            group["gap"] = [share if regularizes else math.nan for regularizes in regularizing]


class Limits:
    """Those of one run, on where they are wanted, λ's optimizer takes them and something is known to regularise.

    At first the gap is 0: what has learned nothing does not overfit. Raises ValueError when the problem does not say of every
    number of one λ whether it regularises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, problem: BilevelProblem, wanted: bool) -> None:
        self.optimizer, self.regularizing = optimizer, tuple(problem.regularizing())
        shapes = [tuple(parameter.shape) for parameter in problem.hyper_parameters()]
        if self.regularizing and shapes != [(len(self.regularizing),)]:
            raise ValueError(
                f"regularizing() of {type(problem).__name__} is about one λ of shape ({len(self.regularizing)},), its "
                f"hyper_parameters() have the shapes {shapes}; give one entry for each number, or none"
            )
        groups = optimizer.param_groups if optimizer is not None else []
        takes = bool(groups) and all(group.get("limits") for group in groups)
        self.on = wanted and takes and any(self.regularizing)
        self.begin()

    def begin(self) -> None:
        """As nothing rises at first; what an earlier run has set is lifted where they are not on."""
        self.set(*((1.0, 1.0) if self.on else (math.nan, math.nan)))

    def set(self, train: float, valid: float) -> None:
        if self.optimizer is not None and self.regularizing:
            limit(self.optimizer, self.regularizing, train, valid)
