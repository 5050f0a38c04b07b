"""How much a run may measure besides the validation data: a share of what training costs, counted in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEP = 3  # forwards that an inner step costs: its own, and a backward pass of two
DIAGNOSTICS = 4  # forwards that the diagnostics cost
# Batches that a clean training loss and statistics of batch norms come from at least. resnet18 on 16 batches of 32 digits: its
# validation loss is 8 to 22 % too high with the mean statistics of two of them, 2 % with those of four; those of eight do as
# well as all. With 128 examples in three, as in four of 32, a small ResNet in batches of 50 does as well as with four of 50.
LEAST = 4
FEWER, ENOUGH = 3, 128


@dataclass(frozen=True)
class Allowance:
    """What an evaluation may measure.

    share: of the arithmetic of training, in (0, 1]. Half of it is for the clean training loss, a quarter each for statistics of
        batch norms and for diagnostics.
    before, now: training batches that the run has stepped on, at the last evaluation and at this one.
    examples: of a training batch. None: not known.

    What is allowed is what the share has earned in whole measurements at `now`, less what it had at `before`. So it depends on
    counts alone, and a resumed run measures the same.
    """

    share: float
    before: int
    now: int
    examples: int | None = None

    @property
    def loss_batches(self) -> int:
        """Training batches for the clean training loss.

        A run has earned √S of them after S steps, until the share earns more: its first steps move λ furthest.
        """
        rate = self.share / 2 * STEP

        def earned(steps: int) -> float:
            return math.sqrt(steps) if 4 * rate**2 * steps < 1 else rate * steps + 1 / (4 * rate)  # with one tangent

        return math.floor(earned(self.now)) - math.floor(earned(self.before))

    @property
    def statistics_batches(self) -> int:
        """Training batches for the statistics of batch norms; every evaluation needs some, whatever they cost."""
        least = FEWER if FEWER * (self.examples or 0) >= ENOUGH else LEAST
        return max(least, self._linear(1))

    @property
    def diagnostics(self) -> bool:
        """Whether to compute diagnostics; the first evaluation does."""
        return self.before == 0 or self._linear(DIAGNOSTICS) > 0

    def _linear(self, cost: float) -> int:
        """The number of measurements that cost so many forwards each, for a quarter of the share."""
        before, now = (math.floor(self.share / 4 * STEP * steps / cost) for steps in (self.before, self.now))
        return now - before
