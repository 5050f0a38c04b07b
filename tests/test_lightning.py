"""The callback of Lightning against the real framework: a fit gives the numbers of a plain loop with fxstn.tune."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, TensorDataset

import fxstn
from fxstn import HyperSettings, hp
from tests.test_tune import QUICK, data, mlp

L = pytest.importorskip("lightning.pytorch", reason="Lightning comes with the extra fxstn[lightning]")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torchmetrics import Accuracy  # noqa: E402

from fxstn.integrations.lightning import TuneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the framework, which differ from version to version
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(L.LightningModule):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.net, self.accuracy = mlp(dropout), Accuracy("multiclass", num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def outputs(self, x: Tensor) -> Tensor:
        return self(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(output := self.outputs(x), y)
        self.accuracy(output, y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("valid_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=1e-2)


class CallsItsNet(Classifier):
    def outputs(self, x: Tensor) -> Tensor:
        return self.net(x)


class Shifts(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.0


class ReturnsADict(Classifier):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": super().training_step(batch, 0)}


class OnTheDevice(Classifier):
    """Its batches hold x + 1, and its hooks of transfer write x in their place."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].sub_(1)
        return batch


class Noise(L.Callback):
    """Gives each step noise of its own, in a resumed fit, too."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def callback(**settings: Any) -> TuneCallback:
    return TuneCallback(hparams=[hp.Dropout(), hp.WeightDecay()], **QUICK, **settings)


def fit(
    folder: Path,
    module: Any = None,
    tuner: TuneCallback | None = None,
    epochs: int = 2,
    resume: Any = None,
    loaders: Any = None,
    **options: Any,
) -> tuple[Any, TuneCallback, Any]:
    module, tuner = module or Classifier(), tuner or callback()
    torch.manual_seed(3)
    callbacks = [Noise(), tuner, ModelCheckpoint(folder, save_last=True)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1} | quiet | options
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **options)
    loaders = loaders or (DataLoader(data(60), 6), DataLoader(data(80, 1), 40))
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module, tuner, trainer


def plain(
    accumulate: int = 1, clip: float | None = None, bf16: bool = False, batches: int = 10
) -> tuple[nn.Module, Any]:
    """The loop of a user, with the same batches."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
    torch.manual_seed(3)
    loader, valid = DataLoader(Subset(data(60), range(6 * batches)), 6), DataLoader(data(80, 1), 40)
    specs = [hp.Dropout(), hp.WeightDecay()]
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, **QUICK)
    for epoch in range(2):
        for number, (x, y) in enumerate(loader):
            torch.manual_seed(100 * epoch + number)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), y) / accumulate
            loss.backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model, tuner


LOSS = {"loss_fn": F.cross_entropy}
CASES = {
    "self(x)": ({}, {}, Classifier, {}),
    "self.net(x)": ({}, {}, CallsItsNet, {}),
    "a forward of its own": ({}, {}, Shifts, {}),
    "a dict": ({}, {}, ReturnsADict, {}),
    "loss_fn": ({}, {}, Classifier, LOSS),
    "module": ({}, {}, Classifier, {"module": "net", **LOSS}),
    "forward": ({}, {}, Classifier, {"forward": lambda model, batch: (model(batch[0]), batch[1]), **LOSS}),
    "accumulate and clip": (
        {"accumulate": 2, "clip": 0.1},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        Classifier,
        {},
    ),
    "bf16": ({"bf16": True}, {"precision": "bf16-mixed"}, Classifier, {}),
    "limit": ({"batches": 7}, {"limit_train_batches": 7}, Classifier, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_fit_gives_the_numbers_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    loop, options, kind, settings = CASES[case]
    model, expected = plain(**loop)
    module, tuner, _ = fit(tmp_path, kind(), callback(**settings), **options)
    assert list(tuner.values().values()) == list(expected.values().values()) != list(expected.history.start.values())
    assert all(map(torch.equal, module.net.parameters(), model.parameters()))
    for one, other in zip(tuner.history.rows, expected.history.rows, strict=True):
        assert one["valid_loss"] == other["valid_loss"]


def test_hooks_of_transfer_prepare_validation_batches_too(tmp_path: Path) -> None:
    loaders = []
    for rows in (data(60), data(80, 1)):
        rows.tensors = (rows.tensors[0] + 1, rows.tensors[1])
        loaders.append(DataLoader(rows, 6))
    _, tuner, _ = fit(tmp_path, OnTheDevice(), loaders=loaders)
    assert list(tuner.values().values()) == pytest.approx(list(plain()[1].values().values()), rel=1e-3)


def test_a_resumed_fit_is_the_fit_that_never_stopped(tmp_path: Path) -> None:
    whole, expected, _ = fit(tmp_path / "whole", epochs=4)
    fit(tmp_path / "cut", epochs=2)
    module, tuner, _ = fit(tmp_path / "again", epochs=4, resume=tmp_path / "cut" / "last.ckpt")
    assert tuner.values() == expected.values()
    assert all(map(torch.equal, module.parameters(), whole.parameters()))
    assert tuner.history["valid_loss"] == expected.history["valid_loss"]


def test_what_the_tuner_does_is_logged_and_what_training_step_logs_counts_once(tmp_path: Path) -> None:
    module, tuner, trainer = fit(tmp_path, epochs=1)
    logged, row = trainer.callback_metrics, tuner.history.rows[-1]
    assert logged["loss/valid"].item() == pytest.approx(row["valid_loss"])
    assert logged["hyperparameter/2.dropout"].item() == pytest.approx(row["2.dropout"])
    assert "train_loss" in logged
    assert module.accuracy._update_count == 0  # Lightning has reset it, and no step of the tuner has come after
    seen: list[int] = []
    module.accuracy.register_forward_pre_hook(lambda metric, args: seen.append(metric._update_count))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(data(60), 6), DataLoader(data(80, 1), 40))
    assert len(seen) > 10  # steps of the tuner run training_step, too
    assert max(seen) == 10


def test_after_a_fit_the_model_is_plain_and_another_fit_goes_on(tmp_path: Path) -> None:
    module, tuner, trainer = fit(tmp_path)
    assert all("forward" not in vars(part) for part in module.net.modules())
    assert module.log.__func__ is L.LightningModule.log
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(data(60), 6), DataLoader(data(80, 1), 40))
    assert tuner.history["epoch"] == [1, 2, 3]


class InShares(Classifier):
    """Each process has its share of the same batches, in order. Without dropout, they differ in nothing else."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def loader(self, rows: TensorDataset, size: int) -> DataLoader:
        world = self.trainer.world_size
        return DataLoader(rows, size // world, sampler=DistributedSampler(rows, shuffle=False) if world > 1 else None)

    def train_dataloader(self) -> DataLoader:
        return self.loader(data(64), 16)

    def val_dataloader(self) -> DataLoader:
        return self.loader(data(48, 1), 24)


class Seeded(L.Callback):
    """Gives each process noise of its own. The tuner takes the seed of the first."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        torch.manual_seed(5 + trainer.global_rank)


class Saved(L.Callback):
    """Saves what a process ends with."""

    def __init__(self, folder: Path, tuner: TuneCallback) -> None:
        self.folder, self.tuner = folder, tuner

    def on_train_end(self, trainer: Any, module: Any) -> None:
        weights = [p.detach() for p in module.parameters()]
        end = (self.tuner.values(), self.tuner.history["valid_loss"], weights, trainer.callback_metrics["loss/valid"])
        torch.save(end, self.folder / f"{trainer.world_size}-{trainer.global_rank}")


def fit_in_double(folder: Path, devices: int = 1, **options: Any) -> None:
    hyper = HyperSettings(train_steps=2, optimizer=steep)
    tuner = TuneCallback(hparams=[hp.WeightDecay()], hyper=hyper, response=QUICK["response"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=devices, precision="64-true", use_distributed_sampler=False,
        callbacks=[Seeded(), tuner, Saved(folder, tuner)], **quiet, **options,
    )  # fmt: skip
    trainer.fit(InShares())


def steep(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=3.0)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes_equal_one_on_the_whole_batch(strategy: str, tmp_path: Path) -> None:
    """A program of strategy "ddp" starts itself again for the other process; "ddp_spawn" sends the callback to both."""
    fit_in_double(tmp_path)
    if strategy == "ddp":
        folders = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        program = [sys.executable, __file__, str(tmp_path)]
        subprocess.run(program, check=True, timeout=280, capture_output=True, env=os.environ | {"PYTHONPATH": folders})
    else:
        fit_in_double(tmp_path, 2, strategy=strategy)
    alone, *both = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    assert max(abs(value / 1e-2 - 1) for value in alone[0].values()) > 1e-2
    for result in both:
        for one, other in zip(result, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


class TwoModules(Classifier):
    def outputs(self, x: Tensor) -> Tensor:
        return self.net[1:](self.net[0](x))


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training_step calls net\.0, net\.3, net\.6.*self\(x\)"):
        fit(tmp_path, TwoModules())
    with pytest.raises(ValueError, match=r"no validation dataloader.*valid_loader="):
        fit(tmp_path, loaders=[DataLoader(data(60), 6)])
    with pytest.raises(ValueError, match=r"has no tuner yet"):
        callback().values()


if __name__ == "__main__":
    fit_in_double(Path(sys.argv[1]), 2, strategy="ddp")


def test_after_a_fit_the_tuner_refits_on_all_data_by_the_loss_of_training_step(tmp_path: Path) -> None:
    module, tuning, _ = fit(tmp_path)
    everything = DataLoader(ConcatDataset([data(60), data(80, 1)]), 10)
    model = tuning.tuner.refit(everything, epochs=1)
    (row,) = tuning.tuner.refit_history
    assert math.isfinite(row["train_loss"])
    assert type(model) is type(module.net)
