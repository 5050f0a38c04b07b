"""Lightning: a callback that tunes the regularisation of what a LightningModule trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxstn.bilevel.history import History
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.state import GlobalRandomState, State
from fxstn.bilevel.validation import example_batch
from fxstn.hp import Spec
from fxstn.loops.forwards import Forward, default_forward, loss_in
from fxstn.loops.tune import LoopTuner, TuneSettings, tune, unwrapped

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


class TuneCallback(Callback):
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
        self.valid_loader, self.hparams, self.module = valid_loader, hparams, module
        self.loss_fn, self.valid_loss_fn, self.forward = loss_fn, valid_loss_fn, forward
        self.settings = settings
        self.tuner: LoopTuner | None = None
        self._state: Mapping[str, Any] | None = None

    def values(self) -> dict[str, float]:
        """{name: value} of the hyperparameters, as they are now. Raises ValueError before the first fit."""
        return self._built().values()

    @property
    def history(self) -> History:
        """A row for each epoch so far. Raises ValueError before the first fit."""
        return self._built().history

    def _built(self) -> LoopTuner:
        if self.tuner is None:
            raise ValueError("TuneCallback has no tuner yet: the trainer makes it when it begins to fit")
        return self.tuner

    # Hooks of the trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = TrainingStep(trainer, pl_module)
        valid = self.valid_loader if self.valid_loader is not None else _only_loader(trainer.val_dataloaders)
        called = (
            step.called_module(example_batch(valid)) if self.module is None else pl_module.get_submodule(self.module)
        )
        forward = (
            step.forward_through(called) if self.loss_fn is None else step.forward_by(self.forward or default_forward)
        )
        before, state = self.tuner, self._state
        if state is None and before is not None and before.model is unwrapped(called):
            state = before.state_dict()  # another fit of the same model
        self.tuner = tune(called, trainer.optimizers, self.loss_fn, None, valid, self.hparams, forward=forward,
                          valid_loss_fn=self.valid_loss_fn, **self.settings)  # fmt: skip
        self._state = None
        if state is not None:
            self.tuner.load_state_dict(state)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._built().begin_pass()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        self._built().step(TrainingBatch(batch, batch_idx))
        if trainer.is_last_batch:  # before validation, after which the trainer writes checkpoints
            self._end_pass(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass(pl_module)

    def _end_pass(self, pl_module: LightningModule) -> None:
        tuner = self._built()
        rows = len(tuner.history)
        tuner.end_pass()
        for row in tuner.history.rows[rows:]:
            pl_module.log_dict(tuner.history.tagged(row), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tuner is not None:
            self.tuner.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> State:
        return {} if self.tuner is None else self.tuner.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        self._state = state_dict or None


def _only_loader(loaders: Any) -> Iterable[object]:
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


@dataclass(eq=False)
class _Call:
    """A call of a module, and the calls in it."""

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any = None
    calls: list[_Call] = field(default_factory=list)

    @property
    def passes_on(self) -> bool:
        """Whether the module hands its inputs to one other, and returns what that one does."""
        inner = self.calls[0] if len(self.calls) == 1 else self
        same_inputs = list(map(id, inner.inputs)) == list(map(id, self.inputs))
        return inner is not self and same_inputs and inner.output is self.output


class TrainingStep:
    """The training_step of a LightningModule, run beside the training for the loss that it computes."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module

    def forward_by(self, forward: Forward) -> Forward:
        """A user's forward, for batches of training and of validation."""
        return lambda model, batch: forward(model, self._transferred(batch).batch)

    def forward_through(self, called: nn.Module) -> Forward:
        """forward(model, batch) → (the loss of training_step with the model in place of the module it calls, the batch)."""

        def forward(model: Callable[..., Any], batch: Any) -> tuple[Any, Any]:
            with _attributes(called, forward=lambda *args, **kwargs: model(*args, **kwargs)):
                return loss_in(self._run(batch)), batch

        return forward

    def called_module(self, batch: Any) -> nn.Module:
        """The module with weights to train that training_step calls; not the LightningModule where its forward only passes
        everything on to one of its modules.

        Raises ValueError where training_step calls none, or several.
        """
        calls = self._calls(batch)
        distinct = list(dict.fromkeys(call.module for call in calls))
        if len(distinct) != 1:
            names = {module: name or type(module).__name__ for name, module in self.module.named_modules()}
            called = ", ".join(names[module] for module in distinct) or "no module with weights"
            raise ValueError(
                f"training_step calls {called}, and a tuner follows one module: let training_step call the LightningModule "
                "itself, self(x), with all of them in its forward; or give TuneCallback module= and loss_fn="
            )
        passes_on = distinct[0] is self.module and calls[0].passes_on
        return calls[0].calls[0].module if passes_on else distinct[0]

    def _calls(self, batch: Any) -> list[_Call]:
        """The calls of modules with weights to train in training_step."""
        stack = [_Call(self.module, ())]

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            stack[-1].calls.append(call := _Call(module, (*args, *kwargs.values())))
            stack.append(call)

        def leave(module: nn.Module, args: object, output: object) -> None:
            stack.pop().output = output

        trained = [m for m in self.module.modules() if any(p.requires_grad for p in m.parameters())]
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with ExitStack() as hooks:
            for module in trained:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            self._run(batch)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return stack[0].calls

    def _transferred(self, batch: Any) -> TrainingBatch:
        """A batch as the module's hooks prepare it. Those of training are already."""
        if isinstance(batch, TrainingBatch):
            return batch
        module, state = self.module, self.trainer.state
        with _attributes(state, stage=type(state.stage)("validate")):
            batch = tree_map_only(Tensor, torch.clone, batch)  # hooks may write into it
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return TrainingBatch(module._apply_batch_transfer_handler(batch, module.device, 0), 0)

    def _run(self, batch: Any) -> Any:
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
            with _attributes(module, log=_ignore, log_dict=_ignore), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            before.set()
            trainer.loggers = loggers
            for metric, attributes in metrics:
                vars(metric).clear()
                vars(metric).update(attributes)


def _copies(metric: Metric) -> dict[str, Any]:
    """{name: a copy} of what a metric has collected."""
    values = {name: vars(metric)[name] for name in metric._defaults}
    return {name: value.clone() if isinstance(value, Tensor) else list(value) for name, value in values.items()}


def _ignore(*args: object, **kwargs: object) -> None:
    pass


@contextmanager
def _attributes(owner: object, **values: object) -> Iterator[None]:
    """A context in which an object has attributes of its own."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)
