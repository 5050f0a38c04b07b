"""A refit of a model that was tuned in somebody else's loop: a loop of ours with copies of its optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxstn.bilevel.combined import CombinedOptimizer
from fxstn.bilevel.initial import without_state
from fxstn.bilevel.network_problem import NetworkProblem
from fxstn.bilevel.optimizers import OptimizerLike
from fxstn.bilevel.records import options_of
from fxstn.bilevel.refit import Refittable
from fxstn.bilevel.runner import BilevelRunner
from fxstn.bilevel.sources import length_of
from fxstn.bilevel.state import State
from fxstn.bilevel.tuner import Tuner
from fxstn.frontends.model_forwards import original_forwards
from fxstn.loops.decay import TunedDecay
from fxstn.loops.observed import LoopLoaders
from fxstn.loops.rates import RatesAgain, SeenRates
from fxstn.loops.seen_batches import SeenBatches
from fxstn.loops.step_hooks import hook_steps


class RefittableLoop(Refittable):
    """Base of the tuner in a loop: what a refit takes over of the loop.

    model: the user's.
    """

    model: nn.Module
    problem: NetworkProblem
    _tuner: Tuner
    _stepping: list[Optimizer]
    _groups: list[list[State]]  # the options of each optimizer's groups when the tuner was made
    _seen: SeenBatches
    loaders: LoopLoaders
    _rates: SeenRates

    def _fresh_optimizer(self) -> OptimizerLike:
        """Copies of the loop's optimizers, with the options that their groups had at first."""
        pairs = zip(self._stepping, self._groups, strict=True)
        return [without_state(part, [*groups, *options_of(part)[len(groups) :]]) for part, groups in pairs]

    def _own_settings(self, train_loader: Iterable[object], accumulate: int | None, epochs: int) -> dict[str, Any]:
        """What is known of the loop: how many batches it accumulates, its precision, its rates."""
        tuner, rates = self._tuner, self._rates
        result: dict[str, Any] = {"accumulate": accumulate or max(1, self._seen.most), "callbacks": ()}
        result["execution"] = replace(tuner.settings.execution, device=None, autocast=tuner.autocast)
        if rates.change:
            batches = length_of(train_loader)
            steps = math.ceil(batches / result["accumulate"] if batches else self.steps / len(rates.epochs))
            again = partial(RatesAgain, epochs=rates.epochs, steps=steps * epochs)
            result["step_schedulers"] = {"optimizer": again}
        return result

    @contextmanager
    def _refit_run(self, train_loader: Iterable[object], settings: dict[str, Any]) -> Iterator[BilevelRunner]:
        """As for a runner. The optimizers decay the weights, coupled or not, as in the loop, and the loss does not."""
        terms, stn, loss_fn = self.stn.terms, self.stn, self.problem.training_windows.loss_fn
        with self.loaders.unobserved(), original_forwards(self.model):
            stn.terms = replace(terms, penalties=())
            try:
                run = BilevelRunner(stn, loss_fn, train_loader, None, **settings)
                optimizer = run.optimizers["optimizer"]
                parts = optimizer.parts if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
                decay = TunedDecay(terms.penalties, stn.model, parts, stn.hparams)
                for part in parts:
                    hook_steps(part, decay.before_step, lambda _: None, decay.added_loss)
                yield run
            finally:
                stn.terms = terms
