"""Lightning: a callback that tunes the regularisation of what a LightningModule trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.validation import example_batch
from fxstn.hp import Spec
from fxstn.ir.generators import GlobalRandomState
from fxstn.loops.adapter import Adapter, only_loader
from fxstn.loops.forwards import Forward, default_forward, loss_in
from fxstn.loops.step_module import attributes, module_of_step
from fxstn.loops.tune import TuneSettings

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("fxstn.integrations.lightning needs lightning: pip install 'fxstn[lightning]'") from error


class TrainingBatch(NamedTuple):
    """A batch as training_step had it, and its number in the epoch."""

    batch: Any
    number: int


class TuneCallback(Adapter, Callback):
    """`Trainer(callbacks=[TuneCallback()])` tunes while it fits a LightningModule with automatic optimisation.

    valid_loader: held-out data. Default: the trainer's validation dataloader.
    hparams: as for `fxstn.tune`.
    module: path of the module that training_step calls. Default: the one that it calls, with all that is in it.
    loss_fn, valid_loss_fn, forward: as for `fxstn.tune`, of that module. Default: training_step says what the loss of an output
        is. It then runs more than once for a batch, each time with an output in place of the module's; what it logs and what
        its metrics of torchmetrics see count once.
    settings: as for `fxstn.tune`.

    `tuner` is what `fxstn.tune` returns, `values()` and `history` are its own; before a fit there is none. Each epoch's row is
    logged, with the tags of `fxstn.TensorBoard`: loss/valid, hyperparameter/NAME. Checkpoints of the trainer hold the state of
    the tuner, and `fit(ckpt_path=...)` goes on from it. After a fit the model is a plain one again.
    """

    def __init__(
        self,
        valid_loader: Iterable[object] | None = None,
        hparams: Sequence[Spec] | None = None,
        *,
        module: str | None = None,
        loss_fn: LossFunction | None = None,
        valid_loss_fn: LossFunction | None = None,
        forward: Forward | None = None,
        **settings: Unpack[TuneSettings],
    ) -> None:
        super().__init__(hparams, settings)
        self.valid_loader, self.module, self.forward = valid_loader, module, forward
        self.loss_fn, self.valid_loss_fn = loss_fn, valid_loss_fn

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def log(row: Mapping[str, float]) -> None:
            pl_module.log_dict(row, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

        step = TrainingStep(trainer, pl_module)
        valid = only_loader(trainer.val_dataloaders) if self.valid_loader is None else self.valid_loader
        if self.module is None:
            called = module_of_step(pl_module, lambda: step.run(example_batch(valid)))
        else:
            called = pl_module.get_submodule(self.module)
        forward = (
            step.loss_through(called) if self.loss_fn is None else step.forward_by(self.forward or default_forward)
        )
        self.begin(called, trainer.optimizers, valid, forward, log, self.loss_fn, self.valid_loss_fn)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        self.step(TrainingBatch(batch, batch_idx))
        if trainer.is_last_batch:  # before validation, after which the trainer writes checkpoints
            self.end_pass()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_pass()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()


class TrainingStep:
    """The training_step of a LightningModule, run beside the training for the loss that it computes."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.validating = type(trainer.state.stage)("validate")  # a refit comes after the fit, when there is no stage

    def forward_by(self, forward: Forward) -> Forward:
        """A user's forward, for batches of training and of validation."""
        return lambda model, batch: forward(model, self._transferred(batch).batch)

    def loss_through(self, called: nn.Module) -> Forward:
        """forward(model, batch) → (the loss of training_step with the model in place of the module it calls, the batch)."""

        def forward(model: Any, batch: Any) -> tuple[Any, Any]:
            with attributes(called, forward=lambda *args, **kwargs: model(*args, **kwargs)):
                return loss_in(self.run(batch)), batch

        return forward

    def _transferred(self, batch: Any) -> TrainingBatch:
        """A batch as the module's hooks prepare it. Those of training are already."""
        if isinstance(batch, TrainingBatch):
            return batch
        module, state = self.module, self.trainer.state
        with attributes(state, stage=self.validating):
            batch = tree_map_only(Tensor, torch.clone, batch)  # hooks may write into it
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return TrainingBatch(module._apply_batch_transfer_handler(batch, module.device, 0), 0)

    def run(self, batch: Any) -> Any:
        """What training_step returns. The trainer, its loggers, metrics and random generators do not notice.

        It draws the same random numbers each time that it runs in one step of training.
        """
        parameters = inspect.signature(self.module.training_step).parameters.values()
        wants_number = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        with self._unnoticed():
            batch, number = self._transferred(batch)
            return self.module.training_step(batch, *[number] * wants_number)

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        module, trainer = self.module, self.trainer
        before, loggers = GlobalRandomState.current(), trainer.loggers
        metrics = [(metric, dict(vars(metric))) for metric in module.modules() if isinstance(metric, Metric)]
        for metric, _ in metrics:
            vars(metric).update(_copies(metric))
        trainer.loggers = [DummyLogger() for _ in loggers]
        GlobalRandomState.seeded(trainer.global_step).set()
        try:
            with attributes(module, log=_ignore, log_dict=_ignore), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            before.set()
            trainer.loggers = loggers
            for metric, values in metrics:
                vars(metric).clear()
                vars(metric).update(values)


def _copies(metric: Metric) -> dict[str, Any]:
    """{name: a copy} of what a metric has collected."""
    values = {name: vars(metric)[name] for name in metric._defaults}
    return {name: value.clone() if isinstance(value, Tensor) else list(value) for name, value in values.items()}


def _ignore(*args: object, **kwargs: object) -> None:
    pass
