"""timm's training task, scaler, averages, scheduler and loader: fxstn.tune needs nothing more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import HyperSettings, ResponseSettings, hp

timm = pytest.importorskip("timm", minversion="1.0.30", reason="needs timm 1.0.30 or later")

from timm.data.loader import PrefetchLoader  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402
from timm.utils import NativeScaler  # noqa: E402


def images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorDataset(x, (x[:, 0].float().mean((1, 2)) > 127.5).long())


def trained(task: bool) -> tuple[nn.Module, fxstn.LoopTuner]:
    """A model after two epochs of accumulated, clipped steps, by timm's task and scaler or by hand."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        8, 4, embed_dim=8, depth=2, num_heads=2, num_classes=2, drop_rate=0.4, proj_drop_rate=0.4, drop_path_rate=0.4
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    device = torch.device("cpu")
    train, valid = (PrefetchLoader(DataLoader(images(40, seed), 8), device=device) for seed in (0, 1))
    settings: Any = {"response": ResponseSettings(every=1), "hyper": HyperSettings(train_steps=2)}
    specs = [hp.Dropout(shared=True), hp.StochasticDepth(shared=True), hp.WeightDecay(shared=True)]
    tuner = fxstn.tune(model, optimizer, criterion, train, valid, specs, **settings)
    whole = ClassificationTask(model, criterion, device=device, verbose=False)
    whole.setup_ema(decay=0.9)
    scaler, scheduler = NativeScaler("cpu"), CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
    torch.manual_seed(1)
    for epoch in range(3):
        model.train()
        for index, (x, y) in enumerate(train):
            step = index % 2 == 1 or index == len(train) - 1
            loss = whole(x, y)["loss"] / 2 if task else criterion(model(x), y) / 2
            if task:
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=step)
            else:
                loss.backward()
                if step:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
            if step:
                optimizer.zero_grad()
                whole.update_ema()
                scheduler.step_update(3 * epoch + index // 2)
    assert set(whole.get_checkpoint_state(ema=True)["state_dict_ema"]) == set(model.state_dict())
    return model, tuner


def test_a_task_is_tuned_as_a_plain_loop_is() -> None:
    (model, tuner), (other, plain) = trained(task=True), trained(task=False)
    assert (tuner.steps, plain.steps, len(tuner.history)) == (9, 9, 3)
    assert tuner.values() != pytest.approx(tuner.history.start, rel=1e-2)
    assert tuner.values() == pytest.approx(plain.values(), rel=1e-3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    tuner.detach()
    assert type(tuner.train_loader) is PrefetchLoader
