"""Adapter: what the callbacks of all frameworks do with a tuner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from fxstn.bilevel.history import History
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.state import State
from fxstn.hp import Spec
from fxstn.loops.forwards import Forward
from fxstn.loops.tune import LoopTuner, TuneSettings, tune, unwrapped

Log = Callable[[dict[str, float]], object]  # of a row with the tags of `fxstn.TensorBoard`


class Adapter:
    """The tuner of a framework's callback. It lives as long as the framework trains.

    hparams, settings: as for `fxstn.tune`.

    A framework calls `begin`; `step(batch)` after every batch, whether or not the optimizer has stepped; `end_pass` after the
    last batch of an epoch, once or more; `end`.
    """

    def __init__(self, hparams: Sequence[Spec] | None, settings: TuneSettings) -> None:
        self.hparams, self.settings = hparams, settings
        self.tuner: LoopTuner | None = None
        self._state: State | None = None  # of a checkpoint, from which the next training goes on

    def values(self) -> dict[str, float]:
        """{name: value} of the hyperparameters, as they are now. Raises ValueError before the first training."""
        return self._built().values()

    @property
    def history(self) -> History:
        """A row for each epoch so far. Raises ValueError before the first training."""
        return self._built().history

    def _built(self) -> LoopTuner:
        if self.tuner is None:
            raise ValueError("TuneCallback has no tuner yet: the trainer makes it when it begins to train")
        return self.tuner

    def state_dict(self) -> State:
        """The tuner's, {} before the first training."""
        return {} if self.tuner is None else self.tuner.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Let the next training go on from a state."""
        self._state = state_dict or None

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        valid_loader: Iterable[object],
        forward: Forward,
        log: Log,
        loss_fn: LossFunction | None = None,
        valid_loss_fn: LossFunction | None = None,
        **others: Unpack[TuneSettings],
    ) -> None:
        """Tune from now on. Go on from a checkpoint's state, or from earlier training of the same model.

        log: gets each row of the history.
        others: settings in place of the callback's.
        """
        self.end()  # where training was broken off
        before, state = self.tuner, self._state
        if state is None and before is not None and before.model is unwrapped(model):
            state = before.state_dict()

        def log_last(tuner: LoopTuner) -> None:
            log(tuner.history.tagged(tuner.history.rows[-1]))

        settings: Any = {**self.settings, **others}
        settings["callbacks"] = [*settings.get("callbacks", ()), log_last]
        settings |= {"forward": forward, "valid_loss_fn": valid_loss_fn}
        self.tuner = tune(model, optimizer, loss_fn, None, valid_loader, self.hparams, **settings)
        self._state = None
        if state is not None:
            self.tuner.load_state_dict(state)

    def step(self, batch: object) -> None:
        """Do what is due after a batch."""
        self._built().step(batch)

    def end_pass(self) -> None:
        """Add the epoch's row to the history, unless it is there."""
        self._built().end_pass()

    def end(self) -> None:
        """Leave a plain model."""
        if self.tuner is not None:
            self.tuner.detach()


def only_loader(loaders: Any) -> Iterable[object]:
    """The trainer's validation dataloader. Raises ValueError where it has none, or several."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if len(loaders) > 1:
            raise ValueError(
                f"the trainer has {len(loaders)} validation dataloaders: give TuneCallback one, valid_loader="
            )
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise ValueError("the trainer has no validation dataloader: give fit one, or TuneCallback(valid_loader=...)")
    loader: Iterable[object] = loaders
    return loader
