"""Several optimizers as one: tables with sparse gradients need another than the other weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Several optimizers over different parameters, stepped one after the other.

    Its groups and its state are theirs: a rate that a scheduler sets here is set there. Its state_dict is that of one optimizer
    with all the groups.

    Raises ValueError where two of them have a parameter in common.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            self.state.update(part.state)
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, of which each part gets its groups."""
        super().__setstate__(state)
        self.state = defaultdict(dict, self.state)
        groups = iter(self.param_groups)
        for part in self.parts:
            part.__setstate__({"state": self.state, "param_groups": [next(groups) for _ in part.param_groups]})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step each part.

        closure: computes the loss and its gradients anew, once, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
