"""Short seeded runs of many kinds, bit for bit: what a change of code that should change no number is compared by.

    python -m benchmarks.fingerprint --json before.json   # on one commit
    python -m benchmarks.fingerprint --against before.json  # on another, same machine

Exits with 1, and names the first difference of each run, where a loss, λ or a weight differs in its last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import detection, resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import MultiScaleRoIAlign

import fxstn
from fxstn import hp
from fxstn.ops.response import Response


def images(size: int, examples: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(examples, 3, size, size, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (examples,), generator=generator))


def vectors(examples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(examples, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.3 * torch.randn(examples, 3, generator=generator)).argmax(1))


def words(examples: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randint(0, 20, (examples, 7), generator=generator), torch.randint(0, 3, (examples,), generator=generator)
    )


class LastState(nn.Module):
    """Embedding, two LSTM layers with dropout between them, and a linear head on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1),
        nn.Linear(16, 3),
    )  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def vit() -> nn.Module:
    return VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=3)


def detector() -> nn.Module:
    backbone: Any = nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.Tanh(), nn.Dropout(0.1), nn.Conv2d(4, 4, 3, padding=1)
    )
    backbone.out_channels = 4
    return detection.FasterRCNN(
        backbone, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)), min_size=48, max_size=64,
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), box_head=detection.faster_rcnn.TwoMLPHead(36, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3), rpn_post_nms_top_n_train=8,
        rpn_post_nms_top_n_test=4, rpn_batch_size_per_image=8, box_batch_size_per_image=8,
    )  # fmt: skip


def tuned(
    model: Callable[[], nn.Module], data: TensorDataset, specs: Any = None, settings: Any = None, **options: Any
) -> list[str]:
    """Three epochs of a runner with the default settings, save those given."""
    if options.pop("with_example", False):
        options["example_inputs"] = data.tensors[0][:4]
    stn = fxstn.transform(model(), specs, **options)
    train = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(4))
    groups = {"response": fxstn.ResponseSettings(every=1), "hyper": fxstn.HyperSettings()} | (settings or {})
    groups["hyper"] = replace(groups["hyper"], train_steps=2)
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, train, DataLoader(data, 8), progress=False, **groups)
    runner.fit(3)
    rows = [[f"{key}={value!r}" for key, value in row.items() if key != "seconds"] for row in runner.history.rows]
    return [*(entry for row in rows for entry in row), *state(stn)]


def detected() -> list[str]:
    """Steps of each kind on a detector, which is followed as it runs."""
    generator = torch.Generator().manual_seed(5)
    pictures = [torch.rand(3, 48, 48 + 8 * i, generator=generator) for i in range(2)]
    corners = 24 * torch.rand(2, 2, 2, generator=generator)
    labels = torch.tensor([1, 2])
    inputs = pictures, [{"boxes": torch.cat([c, c + 12], 1), "labels": labels} for c in corners]
    stn = fxstn.transform(detector(), example_inputs=inputs).train()
    optimizer = torch.optim.SGD([*stn.general_parameters(), *stn.response_parameters()], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        general = fxstn.general_loss(stn, lambda output, _: sum(output.values()), inputs, None)
        response = fxstn.response_loss(stn, lambda output, _: sum(output.values()), inputs, None)
        (general + response).backward()
        optimizer.step()
        losses += [f"general={general.item()!r}", f"response={response.item()!r}"]
    return [*losses, *state(stn)]


def state(stn: fxstn.SelfTuningNetwork) -> list[str]:
    """The weights, responses and hyperparameters, a digest each, in order; names may change."""
    responses: dict[object, Tensor] = {}
    for response in (child for child in stn.response.modules() if isinstance(child, Response)):
        responses.setdefault(response.block, response.U)
        if response.R is not None:
            responses[response] = response.R
    tensors = [*stn.model.parameters(), *responses.values(), *stn.hparams.parameters(), *stn.buffers()]
    return [f"tensor {i}={hashlib.sha256(t.detach().numpy().tobytes()).hexdigest()}" for i, t in enumerate(tensors)]


AUGMENTED = [
    hp.Affine("input"),
    hp.ColorJitter("input"),
    hp.Cutout("input"),
    hp.Dropout("4"),
    hp.WeightDecay(shared=True),
]
DECAYED = [hp.Dropout(), hp.WeightDecay(shared=True), hp.DropConnect("7"), hp.LabelSmoothing()]
RUNS: dict[str, Callable[[], list[str]]] = {
    "resnet18": lambda: tuned(lambda: resnet18(num_classes=3), images(32)),
    "lstm": lambda: tuned(LastState, words()),
    "vit": lambda: tuned(vit, images(16)),
    "vit live": lambda: tuned(vit, images(16), [hp.Dropout()], trace="live", with_example=True),
    "vit export": lambda: tuned(vit, images(16), trace="export", with_example=True),
    "detector live": detected,
    "augmented convolutions": lambda: tuned(convolutions, images(16), AUGMENTED),
    "mlp delta": lambda: tuned(mlp, vectors(), DECAYED),
    "mlp centered": lambda: tuned(mlp, vectors(), DECAYED, method="centered"),
    "mlp stn": lambda: tuned(mlp, vectors(), DECAYED, method="stn"),
    "mlp structured": lambda: tuned(mlp, vectors(), DECAYED, response="structured"),
    "mlp recomputed, paper": lambda: tuned(mlp, vectors(), DECAYED, recompute=True,
                                           settings=fxstn.PAPER),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--against", type=Path, help="compare with these results")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.runs or RUNS:
        torch.manual_seed(0)
        results[name] = RUNS[name]()
        print(f"{name}: {hashlib.sha256(json.dumps(results[name]).encode()).hexdigest()[:16]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.against is None:
        return 0
    before, differ = json.loads(options.against.read_text(encoding="utf-8")), 0
    for name, entries in results.items():
        pairs = zip(before.get(name, ["no such run"]), entries, strict=False)
        first = next(((old, new) for old, new in pairs if old != new), None)
        if first or len(before.get(name, [])) != len(entries):
            differ += 1
            print(f"{name} differs: {first[0]} was before, {first[1]} is now" if first else f"{name} differs in length")
    print("all equal" if not differ else f"{differ} of {len(results)} runs differ")
    return min(differ, 1)


if __name__ == "__main__":
    sys.exit(main())
