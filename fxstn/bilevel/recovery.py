"""Going back when a loss is no longer a number."""

from __future__ import annotations

from dataclasses import dataclass

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import BatchPreparer
from fxstn.bilevel.checkpoint_manager import CheckpointManager
from fxstn.bilevel.faults import OFFENDERS, BadLoss, DivergedError, warn_caller
from fxstn.bilevel.monitors import Monitors
from fxstn.bilevel.optimizers import Updates
from fxstn.bilevel.problem import BilevelProblem


@dataclass
class Recovery:
    """Goes back to the state kept last, `attempts` times in all."""

    checkpoints: CheckpointManager
    problem: BilevelProblem
    updates: Updates
    monitors: Monitors
    prepare: BatchPreparer
    attempts: int

    def go_back(self, fault: BadLoss) -> None:
        """Restore the state kept last, and halve the learning rates that the fault speaks against, anew for each attempt.

        From here on every batch is checked. Raises DivergedError after all attempts, or ValueError where the batch at hand
        holds NaN or an infinity.
        """
        counters, history = self.checkpoints.parts.counters, self.checkpoints.parts.history
        done = counters.rollbacks + 1
        if done > self.attempts:
            self.prepare.check()
            raise DivergedError(self._last_words(fault))
        before = self.monitors.warnings
        self.checkpoints.restore()
        counters.rollbacks = done
        self.updates.drop_gradients()
        slowed = [name for name in OFFENDERS[fault.name] if name in self.updates.optimizers]
        factor = 0.5**self.checkpoints.restorations
        rates = ", ".join(f"{name} {self.updates.slow(name, factor):.3g}" for name in slowed)
        text = f"{fault}; back to epoch {len(history)} with lower learning rates: {rates} (attempt {done} of {self.attempts})"
        self.monitors.warnings = [*before, (len(history) + 1, text)]
        self.prepare.check_finite = True
        if not distributed.rank():
            warn_caller(text)

    def _last_words(self, fault: BadLoss) -> str:
        values = ", ".join(f"{key}={value:.4g}" for key, value in list(self.problem.values().items())[:20])
        record, out_dir = self.checkpoints.parts.best.record, self.checkpoints.out_dir
        place = f"in {out_dir / 'best.pt'}" if out_dir else "in runner.best"
        best = f"the best model, of epoch {record['epoch']}, is {place}" if record else "no epoch was done"
        return f"{fault} (λ: {values}); {best}; lower the learning rate of the weights or of the response"
