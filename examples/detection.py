"""Tune a small detector of drawn shapes, against the same detector trained with the start kept for as many epochs.

Images show circles, squares and triangles on noise. The detector is torchvision's SSD on a small backbone. Both runs begin with
the same weights, and with colour, affine maps, flips, erased boxes, dropout and weight decay as usual recipes have them; the
affine maps and flips move the boxes along. The tuned run moves these twelve numbers while it trains, with the default settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import box_iou
from torchvision.transforms import v2

import fxstn
from fxstn import hp

SIDE = 64  # pixels
CLASSES = ("circle", "square", "triangle")  # 1, 2, 3; class 0 is the background
COLUMNS = ["valid loss", "test loss", "test AP", "seconds"]


def drawn(count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """`count` images (3, 64, 64) of one to three shapes, each with the boxes and classes of its shapes."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.rand, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    examples = []
    for _ in range(count):
        image, boxes, labels = 0.3 + 0.4 * random(3, 1, 1) + 0.25 * (random(3, SIDE, SIDE) - 0.5), [], []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            label, radius = int(torch.randint(1, 4, (), generator=generator)), float(6 + 8 * random(()))
            x, y = (radius + (SIDE - 2 * radius) * random(2)).tolist()
            across, down = (columns - x) / radius, (rows - y) / radius  # -1 to 1 within the box
            box = (across.abs() < 1) & (down.abs() < 1)
            inside = (across**2 + down**2 < 1, box, box & (across.abs() < (down + 1) / 2))[label - 1]
            image = torch.where(inside, random(3, 1, 1) + 0.25 * (random(3, SIDE, SIDE) - 0.5), image)
            boxes.append([x - radius, y - radius, x + radius, y + radius])
            labels.append(label)
        examples.append((image.clamp(0, 1), {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}))
    return examples


class Backbone(nn.Module):
    """Images → maps of features at an eighth and at a sixteenth of their size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width
        self.drop = nn.Dropout2d(0.1)
        self.trunk = nn.Sequential(*(self.halving(before, width) for before in (3, width, width)))
        self.top = self.halving(width, width)

    @staticmethod
    def halving(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.drop(self.trunk(x))
        return {"fine": x, "coarse": self.top(x)}


def detector(width: int) -> fxstn.DetectionLosses:
    """The detector, and augmentations at usual strengths."""
    boxes = DefaultBoxGenerator([[], []], scales=[0.2, 0.33, 0.5])
    head = SSDHead([width, width], boxes.num_anchors_per_location(), len(CLASSES) + 1)
    model = SSD(
        Backbone(width), boxes, (SIDE, SIDE), len(CLASSES) + 1, head=head, image_mean=[0.5] * 3, image_std=[0.25] * 3,
        detections_per_img=10,
    )  # fmt: skip
    return fxstn.DetectionLosses(
        model,
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5),
        v2.RandomHorizontalFlip(),
        v2.RandomErasing(0.1),
    )


def by_image(examples: list) -> tuple:
    return tuple(zip(*examples, strict=True))


@torch.no_grad()
def average_precision(model: nn.Module, loader: DataLoader, overlap: float = 0.5) -> float:
    """The mean over classes of the area under precision against recall, of boxes with such an overlap (IoU) with a true one."""
    pairs = [pair for images, targets in loader for pair in zip(model.eval()(list(images)), targets, strict=True)]
    areas = []
    for label in range(1, len(CLASSES) + 1):
        hits: list[tuple[float, bool]] = []  # (score, whether it is the best one of a true box) of every box found
        total = 0
        for result, target in pairs:
            true = target["boxes"][target["labels"] == label]
            chosen = result["labels"] == label
            total, free = total + len(true), torch.ones(len(true), dtype=torch.bool)
            for score, overlaps in zip(
                result["scores"][chosen].tolist(), box_iou(result["boxes"][chosen], true), strict=True
            ):
                best = int((overlaps * free).argmax()) if len(true) else 0
                hit = len(true) > 0 and bool(free[best]) and float(overlaps[best]) >= overlap
                hits.append((score, hit))
                if hit:
                    free[best] = False
        right = torch.tensor([hit for _, hit in sorted(hits, reverse=True)], dtype=torch.float64)
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        best_after = precision.flip(0).cummax(0).values.flip(0)
        areas.append(float((best_after * right).sum()) / max(total, 1))
    return statistics.mean(areas)


def run(seed: int, tuned: bool, args: argparse.Namespace) -> dict[str, float]:
    """One run: losses, average precision and seconds, and the hyperparameters of the best epoch."""
    torch.manual_seed(seed)
    model = detector(args.width)
    sets = [drawn(size, 3 * seed + i) for i, size in enumerate((args.train_size, args.valid_size, args.test_size))]
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(sets[0], 20, shuffle=True, generator=order, collate_fn=by_image)
    valid, test = (DataLoader(part, 20, collate_fn=by_image) for part in sets[1:])
    inputs, _ = model.unpack_batch(by_image(sets[0][:4]))
    specs = [hp.ColorJitter(), hp.Affine(), hp.Flip(), hp.Erasing(), hp.Dropout(), hp.WeightDecay(shared=True)]
    stn = fxstn.transform(model, specs, example_inputs=inputs, trace="live")  # its forward branches on data
    start = stn.hparams.values()
    still = None if tuned else fxstn.Schedule({name: [value] for name, value in start.items()})
    adam = partial(torch.optim.Adam, lr=args.rate)
    runner = fxstn.BilevelRunner(
        stn, fxstn.detection_loss, train, valid, optimizer=adam, schedule=still, progress=args.progress
    )
    clock = time.process_time()
    history = runner.fit(args.epochs)
    clock = time.process_time() - clock
    stn.model.load_state_dict(runner.best["model"])
    losses = runner.best["valid_loss"], runner.evaluate(test)["valid_loss"]
    result = dict(zip(COLUMNS, (*losses, average_precision(stn.model, test), clock), strict=True))
    return result | (history.outcome().values if tuned else start)


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of each run")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each kind, on images of their own; the table shows means"
    )
    parser.add_argument("--train-size", type=int, default=100, help="training images")
    parser.add_argument("--valid-size", type=int, default=100, help="validation images")
    parser.add_argument("--test-size", type=int, default=300, help="test images")
    parser.add_argument("--width", type=int, default=32, help="channels")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a bar")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args(arguments)
    results: dict[str, list[dict[str, float]]] = {"start kept": [], "tuned": []}
    for seed in range(args.seeds):
        for name, runs in results.items():
            runs.append(run(seed, name == "tuned", args))
    means = [[name, *(statistics.mean(run[c] for run in runs) for c in COLUMNS)] for name, runs in results.items()]
    print(f"\n{args.train_size} training images, {args.epochs} epochs, mean of {args.seeds} seeds, best epoch:")
    print(tabulate(means, ["", *COLUMNS], floatfmt=".3f"))
    names = [name for name in results["tuned"][0] if name not in COLUMNS]
    rows = [[n, results["start kept"][0][n], *(run[n] for run in results["tuned"])] for n in names]
    print(tabulate(rows, ["", "start", *(f"seed {seed}" for seed in range(args.seeds))], floatfmt=".3g"))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
