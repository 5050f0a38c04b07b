"""What the paper's CIFAR-10 augmentations cost, each example at its own strengths, against other ways of doing the same.

    python -m benchmarks.augment [--rounds 9] [--json FILE]

ColorJitter, Affine and Cutout on a batch of 128 32×32 images, the strengths of each example drawn around the start: inside
the graph (fxstn), image by image through PIL and torchvision in one process and in one per core, image by image with
torchvision on tensors, and with kornia's batched functions (where kornia is installed); beside them a training step of
resnet18 on the batch. Alternating, medians. Writes benchmarks/results/augment-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from fxstn import hp
from fxstn.hp.bijection import Bijection
from fxstn.tools.bench import environment
from fxstn.tools.measure import step_times

SPECS = (hp.ColorJitter, hp.Affine, hp.Cutout)
COLOURS = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue)
RESULTS = Path(__file__).parent / "results"


def strengths(batch: int) -> torch.Tensor:
    """(batch, 10): the specs' starts, perturbed with σ = 1, per example."""
    hyperparameters = [one for spec in SPECS for one in spec().hyperparameters("input")]
    start = torch.tensor([one.unconstrained for one in hyperparameters])
    return Bijection(hyperparameters)(start + torch.randn(batch, len(start)))


def batched(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """fxstn's operations as a graph calls them."""
    columns = given.unbind(1)
    for spec in SPECS:
        own, columns = columns[: len(spec.numbers)], columns[len(spec.numbers) :]
        x = spec.function(x, *own, **spec.defaults)
    return x


def one_image(image: Any, given: list[float], pil: bool) -> Any:
    """One image, a tensor or a PIL image, through torchvision's functions; a tensor comes out."""
    uniform = random.uniform
    colours = list(range(4))
    random.shuffle(colours)
    for i in colours:
        image = COLOURS[i](image, uniform(-given[3], given[3]) if i == 3 else uniform(1 - given[i], 1 + given[i]))
    rotation, translate, scale, shear = given[4:8]
    moved = [round(32 * uniform(-translate, translate)) for _ in range(2)]
    turned, scaled, sheared = uniform(-rotation, rotation), uniform(1 - scale, 1 + scale), uniform(-shear, shear)
    image = vision.affine(image, turned, moved, scaled, [sheared, 0.0], v2.InterpolationMode.BILINEAR)
    image = vision.to_dtype(vision.pil_to_tensor(image), torch.float32, scale=True) if pil else image
    length = int(given[9])
    for _ in range(int(given[8])):
        top, left = (random.randrange(32) - length // 2 for _ in range(2))
        image[:, max(top, 0) : top + length, max(left, 0) : left + length] = 0
    return image


def image_by_image(images: list[Any], given: list[list[float]], pil: bool) -> torch.Tensor:
    return torch.stack([one_image(image, own, pil) for image, own in zip(images, given, strict=True)])


def by_processes(pool: ProcessPoolExecutor, images: list[Any], given: list[list[float]], count: int) -> torch.Tensor:
    shares = [pool.submit(image_by_image, images[i::count], given[i::count], True) for i in range(count)]
    return torch.cat([share.result() for share in shares])


def kornia_batched(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """kornia's functions with one value per example; one order of the colours for the batch, and Cutout by fxstn."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_hue,
        adjust_saturation_with_gray_subtraction,
    )
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine

    draw = 2 * torch.rand(len(x), 8, device=x.device) - 1
    change = draw * given[:, :8]
    colours: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda y: adjust_brightness_accumulative(y, 1 + change[:, 0]),
        lambda y: adjust_contrast_with_mean_subtraction(y, 1 + change[:, 1]),
        lambda y: adjust_saturation_with_gray_subtraction(y, 1 + change[:, 2]),
        lambda y: adjust_hue(y, 2 * torch.pi * change[:, 3]),
    ]
    for i in torch.randperm(4).tolist():
        x = colours[i](x)
    sheared = torch.deg2rad(change[:, 7])
    other = (2 * torch.rand(len(x), device=x.device) - 1) * given[:, 5]
    moved = (32 * torch.stack([change[:, 5], other], 1)).round()
    center = torch.full((len(x), 2), 15.5, device=x.device)
    scaled = (1 + change[:, 6])[:, None].expand(-1, 2)
    matrix = get_affine_matrix2d(moved, center, scaled, change[:, 4], sheared, torch.zeros_like(sheared))
    x = warp_affine(x, matrix[:, :2], (32, 32), align_corners=False)
    return hp.Cutout.function(x, given[:, 8], given[:, 9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which the variants alternate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="where to write (default: benchmarks/results/augment-DEVICE.json)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    x, given = torch.rand(args.batch_size, 3, 32, 32), strengths(args.batch_size)
    lists, pictures = given.tolist(), [vision.to_pil_image(image) for image in x]
    cores = os.cpu_count() or 1
    model = torchvision.models.resnet18(num_classes=10).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    on_device, strengths_there = x.to(args.device), given.to(args.device)
    target = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)

    def train() -> None:
        F.cross_entropy(model(on_device), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    # A forked process would wait for threads of torch that it does not have.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        ways: dict[str, Callable[[], Any]] = {
            "fxstn": partial(batched, on_device, strengths_there),
            "PIL, image by image": partial(image_by_image, pictures, lists, True),
            f"PIL, in {cores} processes": partial(by_processes, pool, pictures, lists, cores),
            "torchvision, image by image": lambda: image_by_image([image.clone() for image in x], lists, False),
            "kornia": partial(kornia_batched, on_device, strengths_there),
            "a training step of resnet18": train,
        }
        try:
            ways["kornia"]()
        except ImportError:
            del ways["kornia"]
        times = step_times({name: (way, 1) for name, way in ways.items()}, args.rounds, 3, args.device, False)
    rows = [
        {
            "way": name,
            "ms": 1e3 * seconds,
            "times fxstn": seconds / times["fxstn"],
            "of a step": seconds / list(times.values())[-1],
        }
        for name, seconds in times.items()
    ]
    for row in rows:
        print(
            f"{row['way']:30s} {row['ms']:8.1f} ms  {row['times fxstn']:6.2f} × fxstn  {row['of a step']:6.2f} of a step"
        )
    path = args.json or RESULTS / f"augment-{args.device}.json"
    path.write_text(
        json.dumps({"environment": environment(args.device), "batch": args.batch_size, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
