"""TrainingLoop: steps of w₀ over the batches of an epoch, with the tuner's steps between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

from fxstn.bilevel import distributed
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.loaders import ResumableLoader
from fxstn.bilevel.tuner import Tuner
from fxstn.network import SelfTuningNetwork

# λ of each network before its first run.
STARTS = WeakKeyDictionary[SelfTuningNetwork, Mapping[str, float]]()


class TrainingLoop:
    """Trains w₀ for an epoch at a time.

    tuner: has the optimizer of w₀.
    loader: of the training batches.
    batches: the number of them. None: unknown.
    """

    def __init__(self, tuner: Tuner, loader: ResumableLoader, batches: int | None) -> None:
        self.tuner, self.loader = tuner, loader
        accumulate = tuner.settings.accumulate
        self.length = math.ceil(batches / accumulate) if batches else None  # inner steps of an epoch
        self.lengths_differ = distributed.lengths_differ(loader.loader)
        self._named: set[str] = set()  # weights that a warning has named

    @property
    def epochs(self) -> float:
        """How many are done, with the part of the one under way, where its length is known."""
        return len(self.tuner.history) + min(1.0, self.tuner.means.steps / (self.length or math.inf))

    def epoch(self, pause: Callable[[], None]) -> dict[str, float]:
        """Train for an epoch, or for the rest of it, of which nothing may be left; returns the mean losses.

        pause: called between cycles; in a process of its own between inner steps, too.

        Raises BadLoss, and ValueError where the train loader yields no batch.
        """
        tuner, problem = self.tuner, self.tuner.problem
        if not tuner.means.steps:
            tuner.begin_epoch()
            self.loader.begin()
        self._warn_of_trained()
        self._warn_of_unstepped()
        problem.train()
        while batches := self._next_batches():
            self._replay()
            prepared = [tuner.prepare(batch, "train_loader", tuner.time) for batch in batches]
            loss = tuner.stepper.inner(prepared, tuner.notes)
            cycle_over = tuner.after_step(prepared, None if loss is None else {"train_loss": loss})
            if cycle_over or distributed.processes() == 1:
                pause()
        if not tuner.means.steps:
            raise ValueError("train_loader is empty: it yielded no batch")
        return tuner.epoch_losses()

    def _next_batches(self) -> list[object]:
        """The batches of the next inner step; none, in all processes, where one of them has none left."""
        batches = self.loader.take(self.tuner.settings.accumulate)
        if self.lengths_differ and distributed.any_process(not batches, self.tuner.device):
            self.loader.end()
            return []
        return batches

    def _warn_of_trained(self) -> None:
        """Warn where this run begins with a network whose λ another run has moved, in this process."""
        tuner = self.tuner
        if tuner.network is None or tuner.schedule is not None:
            return
        start = STARTS.setdefault(tuner.network, tuner.history.start)
        if not tuner.counters.steps and start != tuner.history.start:
            warn_caller("another run has trained this network: this one starts from its weights and values, and "
                        "a refit from these weights; for a fresh run transform a new model")  # fmt: skip

    def _warn_of_unstepped(self) -> None:
        """Warn, once for each, of weights that require a gradient and that no optimizer steps."""
        groups = self.tuner.updates.optimizers["optimizer"].param_groups
        stepped = {id(weight) for group in groups for weight in group["params"]}
        without = {id(weight) for weight in self.tuner.problem.general_parameters()} - stepped
        names = [name for name, weight in self.tuner.problem.named_parameters() if id(weight) in without]
        if new := [name for name in names if name not in self._named]:
            self._named.update(new)
            shown = ", ".join(new[:3]) + ", …" * (len(new) > 3)
            warn_caller(f"no optimizer steps {shown}, frozen when the runner was made and trained from {self.tuner.time} on: "
                        "freeze such weights after the runner is made, in a callback's on_fit_start at the latest")  # fmt: skip

    def _replay(self) -> None:
        """Set λ to where the schedule, if there is one, has it at the end of this step."""
        tuner, schedule = self.tuner, self.tuner.schedule
        if schedule is not None and tuner.network is not None:
            step = tuner.means.steps + 1
            length = self.length or step  # of a loader that does not know it: the values at the end of the epoch
            tuner.network.hparams.set(schedule.at(tuner.epoch - 1 + step / length))
