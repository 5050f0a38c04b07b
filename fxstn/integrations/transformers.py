"""Hugging Face Trainer: a callback that tunes the model that a Trainer trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Unpack

import torch

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.settings import ExecutionSettings
from fxstn.hp import Spec
from fxstn.loops.adapter import Adapter
from fxstn.loops.tune import TuneSettings

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "fxstn.integrations.transformers needs transformers: pip install 'fxstn[transformers]'"
    ) from error

FILE = "fxstn_tuner.pt"  # in the folder of a checkpoint
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's names


class TuneCallback(Adapter, TrainerCallback):
    """`trainer.add_callback(TuneCallback(trainer))` tunes the model of a Trainer while it trains.

    trainer: its compute_loss is the loss, so that label smoothing, compute_loss_func and an override count.
    hparams: as for `fxstn.tune`.
    valid_loader: held-out data. Default: trainer.get_eval_dataloader().
    settings: as for `fxstn.tune`.

    `tuner` is what `fxstn.tune` returns; before `trainer.train()` there is none. Each row of its history goes to trainer.log,
    as tune/loss/valid and tune/hyperparameter/NAME, and so to Weights & Biases, MLflow or TensorBoard. Checkpoints have the
    file fxstn_tuner.pt, from which `train(resume_from_checkpoint=...)` goes on. After training the model is a plain one again;
    a further `train()` of the same model goes on with its values.
    """

    def __init__(
        self,
        trainer: Trainer,
        hparams: Sequence[Spec] | None = None,
        valid_loader: Iterable[object] | None = None,
        **settings: Unpack[TuneSettings],
    ) -> None:
        super().__init__(hparams, settings)
        self.trainer, self.valid_loader = trainer, valid_loader
        self._batch: object = None  # that the trainer trains on
        self._checkpoint: str | bool | None = None  # that training resumes from
        self._observe()

    def _observe(self) -> None:
        """Note what no event tells: the checkpoint that training resumes from, and the batch of each training step."""
        train, training_step = self.trainer.train, self.trainer.training_step

        @wraps(train)
        def observed_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            self._checkpoint = resume_from_checkpoint
            return train(resume_from_checkpoint, *args, **kwargs)

        @wraps(training_step)
        def observed_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._batch = dict(inputs) if isinstance(inputs, Mapping) else inputs  # a step may take the labels out
            return training_step(model, inputs, *args, **kwargs)

        self.trainer.train, self.trainer.training_step = observed_train, observed_step

    def _forward(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """(the trainer's loss of a batch, the batch)."""
        return self.trainer.compute_loss(model, dict(batch)), batch

    # Events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        execution = self.settings.get("execution", ExecutionSettings())
        if execution.autocast is None:  # accelerate's autocast is within the forward, where a tuner does not see it
            precision = PRECISIONS.get(trainer.accelerator.mixed_precision)
            execution = replace(execution, autocast=precision)
        if self._checkpoint:
            self._resume()
        valid = trainer.get_eval_dataloader() if self.valid_loader is None else self.valid_loader
        self.begin(trainer.model_wrapped, trainer.optimizer, valid, self._forward, self._log, execution=execution)

    def _resume(self) -> None:
        """Go on from the tuner's file in the checkpoint. Warns where there is none."""
        last = get_last_checkpoint(self.trainer.args.output_dir) if self._checkpoint is True else self._checkpoint
        path = Path(str(last)) / FILE
        if path.is_file():
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            self.end()
            self.tuner = None
            warn_caller(f"the checkpoint {last} has no {FILE}: λ begins at its start", UserWarning)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step(self._batch)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step(self._batch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if float(state.epoch or 0).is_integer():  # before the checkpoint of an epoch's last step
            self.end_pass()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end_pass()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not args.save_only_model and folder.is_dir():  # a search has its folders elsewhere
            torch.save(self.state_dict(), folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end()

    def _log(self, row: dict[str, float]) -> None:
        """Log a row. What the trainer has to log itself stays due."""
        control = self.trainer.control
        due = control.should_log
        self.trainer.log({f"tune/{tag}": value for tag, value in row.items()})
        control.should_log = due
