"""Hugging Face Trainer: TuneCallback does what fxstn.tune does in a plain loop, with everything that a Trainer has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxstn
from fxstn import HyperSettings, ResponseSettings, hp

transformers = pytest.importorskip("transformers", reason="needs the extra fxstn[transformers]")

from fxstn.integrations.transformers import FILE, TuneCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
QUICK: Any = {
    "response": ResponseSettings(every=1),
    "hyper": HyperSettings(train_steps=2, recalibrate=2),
    "trace": "auto",
}


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A Trainer of transformers 4.50 leaves its precision to every later Accelerator, in environment variables."""
    with mock.patch.dict(os.environ):
        yield


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences of different lengths; the label says whether most of their tokens are high."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        tokens = torch.randint(1, 20, (length,), generator=generator)
        result.append({"input_ids": tokens.tolist(), "labels": int((tokens > 10).float().mean() > 0.5)})
    return result


def padded(examples: list[dict[str, Any]]) -> transformers.BatchEncoding:
    """A batch as DataCollatorWithPadding makes it: as long as its longest sentence."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in examples], batch_first=True)
    labels = torch.tensor([row["labels"] for row in examples])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})


TRAIN, VALID = rows(32, 0), rows(16, 1)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer_of(folder: Path, **arguments: Any) -> Any:
    options = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "epoch", "disable_tqdm": True, "lr_scheduler_type": "constant", "seed": 7,
        "optim": "adamw_torch",
    }  # fmt: skip
    settings = transformers.TrainingArguments(str(folder), **options | arguments)
    data = {"train_dataset": TRAIN, "eval_dataset": VALID, "data_collator": padded}
    trainer = transformers.Trainer(bert(), settings, **data)
    trainer.add_callback(callback := TuneCallback(trainer, [hp.Dropout(shared=True)], **QUICK))
    return trainer, callback


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def shown(history: fxstn.History) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Recorded:
    """What a Trainer trains on: {epoch: batches}, and the random state at the beginning of each epoch. A train_loader."""

    def __init__(self, trainer: Any) -> None:
        self.epochs: dict[int, list[tuple[dict[str, Tensor], Any]]] = {}
        self.states: dict[int, Tensor] = {}
        self.epoch, self.step, self.trainer = 0, trainer.training_step, trainer
        trainer.training_step = self.training_step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        epoch = int(self.trainer.state.epoch or 0)
        self.states.setdefault(epoch, torch.get_rng_state())
        self.epochs.setdefault(epoch, []).append((dict(inputs), num_items_in_batch))
        return self.step(model, inputs, num_items_in_batch)

    def __iter__(self) -> Any:
        yield from [dict(batch) for batch, _ in self.epochs[self.epoch]]

    def train(self, accumulate: int, clip: float) -> tuple[nn.Module, fxstn.LoopTuner]:
        """The same training in a plain loop."""
        trainer, model = self.trainer, bert()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        torch.manual_seed(7)  # as the Trainer has done when it begins

        def forward(called: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
            return trainer.compute_loss(called, dict(batch)), batch

        valid = DataLoader(VALID, 8, collate_fn=padded)
        tuner = fxstn.tune(model, optimizer, None, self, valid, [hp.Dropout(shared=True)], forward=forward, **QUICK)
        for epoch in self.epochs:
            self.epoch = epoch
            torch.set_rng_state(self.states[self.epoch])
            model.train()
            counts = [count for _, count in self.epochs[self.epoch]]
            for number, (batch, count) in enumerate(zip(self, counts, strict=True), 1):
                loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
                (loss if trainer.model_accepts_loss_kwargs else loss / accumulate).backward()
                if number % accumulate == 0 or number == len(counts):
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
        return model, tuner


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({}, 16), ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "label_smoothing_factor": 0.1}, 8)],
    ids=["plain", "accumulated, clipped, smoothed"],
)
def test_a_trainer_tunes_as_a_plain_loop_does_bit_for_bit(tmp_path: Path, arguments: dict, steps: int) -> None:
    trainer, callback = trainer_of(tmp_path, **arguments)
    recorded = Recorded(trainer)
    trainer.train()
    model, tuner = recorded.train(arguments.get("gradient_accumulation_steps", 1), arguments.get("max_grad_norm", 1.0))
    assert (callback.tuner.steps, tuner.steps) == (steps, steps)
    assert tuner.values()["dropout"] != pytest.approx(0.3, abs=1e-3)
    assert shown(callback.tuner.history) == shown(tuner.history)
    assert torch.equal(weights(trainer.model), weights(model))


def test_a_tuned_model_is_saved_and_left_as_a_plain_one(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, save_strategy="epoch", num_train_epochs=1)
    keys = list(trainer.model.state_dict())
    trainer.train()
    assert type(trainer.model) is transformers.BertForSequenceClassification
    assert list(trainer.model.state_dict()) == keys
    assert all("forward" not in vars(module) for module in trainer.model.modules())
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert torch.equal(weights(saved), weights(trainer.model))
    values = callback.tuner.values()
    trainer.args.num_train_epochs = 2
    trainer.train()  # further training goes on with the values
    assert callback.tuner.history.start == {"dropout": pytest.approx(0.3)}
    assert callback.tuner.history["dropout"][0] == values["dropout"]
    assert len(callback.tuner.history) == 3


def test_each_row_goes_to_the_trainers_log_and_its_own_logs_stay(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, eval_strategy="epoch")
    trainer.train()
    logs = trainer.state.log_history
    tuned = [log["tune/hyperparameter/dropout"] for log in logs if "tune/loss/valid" in log]
    assert tuned == callback.tuner.history["dropout"]
    assert sum("loss" in log for log in logs) == 2
    evaluated = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert evaluated == pytest.approx(callback.tuner.history["valid_loss"], rel=1e-5)


@pytest.mark.parametrize("step", [8, 5])
def test_a_resumed_trainer_is_the_one_that_never_stopped(tmp_path: Path, step: int) -> None:
    whole, tuned = trainer_of(tmp_path, save_strategy="steps", save_steps=step, save_total_limit=9)
    whole.train()
    resumed, callback = trainer_of(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert callback.tuner.steps == tuned.tuner.steps == 16
    assert shown(callback.tuner.history) == shown(tuned.tuner.history)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    (tmp_path / f"checkpoint-{step}" / FILE).unlink()
    untuned, _ = trainer_of(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"has no fxstn_tuner\.pt: λ begins at its start"):
        untuned.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer, callback = trainer_of(tmp_path, learning_rate=0.1, num_train_epochs=3, **best)
    trainer.train()
    history = callback.tuner.history
    assert trainer.state.best_global_step == 8 * history.best()["epoch"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history.best()["valid_loss"], rel=1e-5)


def test_bfloat16_is_that_of_the_trainer(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, bf16=True, num_train_epochs=1, eval_strategy="epoch")
    trainer.train()
    assert callback.tuner.steps == 8
    assert callback.tuner.settings["execution.autocast"] == "torch.bfloat16"
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert callback.tuner.history["valid_loss"] == pytest.approx(losses, abs=2e-3)


def test_after_a_training_the_tuner_refits_on_all_data(tmp_path: Path) -> None:
    trainer, tuning = trainer_of(tmp_path)
    trainer.train()
    model = tuning.tuner.refit(torch.utils.data.DataLoader(TRAIN + VALID, 4, collate_fn=padded), epochs=1)
    assert type(model) is transformers.BertForSequenceClassification
    assert len(tuning.tuner.refit_history) == 1
    assert not torch.equal(weights(model), weights(trainer.model))
