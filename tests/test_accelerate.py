"""fxstn.tune in loops of Hugging Face accelerate: the numbers are those of a plain loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import HyperSettings, hp
from tests.processes import run
from tests.test_tune import QUICK, data, mlp

pytest.importorskip("accelerate", reason="accelerate comes with the extra fxstn[accelerate]")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

pytestmark = pytest.mark.filterwarnings("ignore")  # of the framework, which differ from version to version


def trained(
    accelerated: bool, accumulate: int = 1, epochs: int = 2, resume: Path | None = None, save: Path | None = None
) -> tuple[nn.Module, Any]:
    model: Any = mlp()
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
    loader, valid = DataLoader(data(60), 6), DataLoader(data(80, 1), 40)
    if accelerated:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model, optimizer, loader, valid = accelerator.prepare(model, optimizer, loader, valid)
    torch.manual_seed(3)
    specs = [hp.Dropout(), hp.WeightDecay()]
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, **QUICK)
    if accelerated:
        accelerator.register_for_checkpointing(tuner)
        if resume:
            accelerator.load_state(str(resume))
    for epoch in range(len(tuner.history), epochs):
        torch.manual_seed(epoch)
        for number, (x, y) in enumerate(loader, 1):
            if accelerated:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            (F.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    if save:
        accelerator.save_state(str(save))
    return model, tuner


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_prepared_loop_gives_the_numbers_of_a_plain_loop(accumulate: int) -> None:
    (model, expected), (prepared, tuner) = (trained(accelerated, accumulate) for accelerated in (False, True))
    assert tuner.values() == expected.values() != expected.history.start
    assert tuner.steps == expected.steps == 20 // accumulate
    assert all(map(torch.equal, prepared.parameters(), model.parameters()))


def test_a_loaded_state_goes_on(tmp_path: Path) -> None:
    model, expected = trained(True, epochs=4)
    trained(True, epochs=2, save=tmp_path)
    again, tuner = trained(True, epochs=4, resume=tmp_path)
    assert tuner.values() == expected.values()
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert tuner.history["valid_loss"] == expected.history["valid_loss"]


def in_double(rank: int, world: int) -> tuple[dict[str, float], list[float], list[Tensor]]:
    """Weight decay tuned in batches of 16 examples of all processes, of which accelerate gives each its share."""
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
        os.environ |= {name: str(value) for name, value in place.items()}  # as torchrun; the group is there already
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    model: Any = mlp(0.0).double()
    parameters, parts = list(model.parameters()), []
    for examples, seed, size in ((64, 0, 16), (48, 1, 24)):
        x, y = data(examples, seed).tensors
        if world == 1 and not parts:  # for training, in the order in which ε is dealt out to two processes
            x, y = (t.view(-1, 2, size // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape) for t in (x, y))
        parts.append(DataLoader(TensorDataset(x.double(), y), size // world))
    optimizer: Any = torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-2)
    model, optimizer, loader, valid = accelerator.prepare(model, optimizer, *parts)
    torch.manual_seed(5 + rank)  # the tuner takes the seed of the first process
    hyper = HyperSettings(train_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    specs = [hp.WeightDecay()]
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, loader, valid, specs, hyper=hyper, response=QUICK["response"])
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    return tuner.values(), tuner.history["valid_loss"], [p.detach() for p in parameters]


def test_two_processes_equal_one_on_the_whole_batch() -> None:
    alone = in_double(0, 1)
    assert max(abs(value / 1e-2 - 1) for value in alone[0].values()) > 1e-2
    for result in run(2, in_double, 2):
        for one, other in zip(result, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
