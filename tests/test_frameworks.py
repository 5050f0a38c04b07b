"""docs/guides/frameworks.md: each block trains and tunes with the framework that it is about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from tests.test_tune import loaders, mlp

PAGE = (Path(__file__).parents[1] / "docs/guides/frameworks.md").read_text(encoding="utf-8")
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for name, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
MODULES = {
    "Lightning Fabric": "lightning.fabric",
    "PyTorch Ignite": "ignite",
    "skorch": "skorch",
    "fastai": "fastai.learner",
}


def test_every_block_is_of_a_framework_that_is_tried() -> None:
    assert {name for name, blocks in BLOCKS.items() if blocks} == set(MODULES)


@pytest.mark.filterwarnings("ignore")  # of the frameworks, which differ from version to version
@pytest.mark.parametrize("name", MODULES)
def test_a_block_tunes_each_epoch_of_the_framework(name: str) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is installed by `make integrations`")
    (block,) = BLOCKS[name]
    model, (train_loader, valid_loader) = mlp(0.3), loaders()
    names: dict[str, Any] = {
        "__name__": "frameworks", "torch": torch, "nn": nn, "fxstn": fxstn, "model": model, "loss_fn": F.cross_entropy,
        "train_loader": train_loader, "valid_loader": valid_loader,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2),
    }  # fmt: skip
    exec(compile(block.replace('accelerator="auto"', 'accelerator="cpu"'), "frameworks.md", "exec"), names)
    tuning = names.get("tuning")
    tuner = names["tuner"] if tuning is None else getattr(tuning, "tuner_", None) or tuning.tuner
    tuner.detach()
    assert (tuner.steps, len(tuner.history)) == (15, 3)
    assert "1.dropout" in tuner.values() or "2.dropout" in tuner.values()
