"""Validation images are spoilt by an operation at a planted strength: the runner finds that strength, from both sides.

A linear regression on images, so that least squares on spoilt training images is an independent witness of what each
strength is worth. (Weight decay: tests/test_quadratic.py.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.optim import SettlingAdam
from fxstn.ops.erase import cutout_mask
from fxstn.ops.noise import by_example

SIZE, IMAGES = 6, 3072


@dataclass(frozen=True)
class Plant:
    """spec: of a start. spoil(x, strength): the operation. planted: its strength in validation; starts: below, above."""

    spec: Callable[[float], hp.Spec]
    spoil: Callable[[Tensor, float], Tensor]
    planted: float
    starts: tuple[float, float]
    name: str


def only(kind: type[hp.Operation], name: str) -> Callable[[float], hp.Spec]:
    """The spec of one number, the others held at 0."""
    others = [other for other in kind.numbers if other != name]

    def spec(start: float) -> hp.Spec:
        starts = dict.fromkeys(others, 5e-7) | {name: start}
        return kind(init=starts, low=dict.fromkeys(others, 0.0), high=dict.fromkeys(others, 1e-6))

    return spec


class OneHole(hp.Operation):
    """Cutout whose one hole has a tuned side."""

    numbers: ClassVar = {"length": hp.Hyperparameter(4, 2, 8, integer=True)}
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, length: Tensor | float) -> Tensor:
        return (~cutout_mask(x, by_example(1.0, x), by_example(length, x), most=1)).to(x.dtype)


def applied(kind: type[hp.Operation], name: str, x: Tensor, strength: float) -> Tensor:
    return kind.function(x, *[strength if name == other else 0.0 for other in kind.numbers], **kind.defaults)


PLANTS = {
    "dropout": Plant(
        lambda start: hp.Dropout("input", init=start),
        lambda x, p: x * (torch.rand_like(x) >= p) / (1 - p), 0.3, (0.03, 0.8), "input.dropout",
    ),
    "cutout": Plant(
 lambda start: OneHole(init=start), lambda x, length: hp.Cutout.function(x, 1, int(length)), 4, (2, 6), "input.length",
),
    "colour": Plant(
        only(hp.ColorJitter, "brightness"), partial(applied, hp.ColorJitter, "brightness"), 0.5, (0.05, 0.9),
        "input.brightness",
    ),
    "affine": Plant(
        only(hp.Affine, "rotation"), partial(applied, hp.Affine, "rotation"), 20.0, (3.0, 40.0), "input.rotation"
    ),
}  # fmt: skip


QUICK = [("dropout", "below")]


@pytest.fixture(params=list(PLANTS))
def plant(request: pytest.FixtureRequest) -> Plant:
    return PLANTS[request.param]


def task(plant: Plant) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, t, x of validation, t of validation): clean images of varying brightness, a linear function of them; spoilt ones."""
    torch.manual_seed(0)
    x, x_valid = (
        (0.1 + 0.4 * torch.rand(IMAGES, 3, SIZE, SIZE)) * (0.3 + 0.7 * torch.rand(IMAGES, 1, 1, 1)) for _ in "ab"
    )
    down, across = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    channel = torch.tensor([1.0, -0.6, 0.4]).view(3, 1, 1)
    weights = torch.cos(2 * across + 1) * torch.sin(3 * down) * channel + 0.5 * across * channel.flip(0)
    weights += 0.3 * (channel + 0.2)
    t, t_valid = ((images * weights).sum((1, 2, 3))[:, None] for images in (x, x_valid))
    mean, deviation = t.mean(), t.std()
    return x, (t - mean) / deviation, plant.spoil(x_valid, plant.planted), (t_valid - mean) / deviation


def least_squares(plant: Plant, strengths: list[float]) -> list[float]:
    """Validation loss of the exact regression (of least norm) on six spoilt copies of the training images, per strength."""
    x, t, x_valid, t_valid = task(plant)

    def columns(images: Tensor) -> Tensor:
        return torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1).double()

    losses = []
    for strength in strengths:
        torch.manual_seed(0)
        copies = torch.cat([columns(plant.spoil(x, strength)) for _ in range(6)])
        w = torch.linalg.pinv(copies.T @ copies, hermitian=True) @ (copies.T @ t.double().repeat(6, 1))
        losses.append((columns(x_valid) @ w - t_valid).square().mean().item())
    return losses


def test_the_planted_strength_is_the_best(plant: Plant) -> None:
    below, above = plant.starts
    low, planted, high = least_squares(plant, [below, plant.planted, above])
    assert planted < 0.95 * low
    assert planted < 0.95 * high


@pytest.mark.parametrize(
    ("plant", "side"),
    [
        pytest.param(name, side, marks=[] if (name, side) in QUICK else pytest.mark.nightly)
        for name in PLANTS for side in ("below", "above")
    ],
    indirect=["plant"],
)  # fmt: skip
def test_the_runner_finds_the_planted_strength(plant: Plant, side: str) -> None:
    x, t, x_valid, t_valid = task(plant)
    start = plant.starts[side == "above"]
    torch.manual_seed(1)
    stn = fxstn.transform(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 1)), [plant.spec(start)])
    train = DataLoader(TensorDataset(x, t), 128, shuffle=True)
    valid = DataLoader(TensorDataset(x_valid, t_valid), 1024, shuffle=True)
    adam = partial(torch.optim.Adam, lr=1e-2)
    runner = fxstn.BilevelRunner(
        stn,
        nn.MSELoss(),
        train,
        valid,
        optimizer=adam,
        response=fxstn.ResponseSettings(every=1),
        hyper=fxstn.HyperSettings(
            train_steps=2, warmup_epochs=10, optimizer=partial(SettlingAdam, limits=False)
        ),  # clean training images say nothing of spoilt ones
        progress=False,
    )
    rows = runner.fit(36).rows
    mean_strength = sum(row[plant.name] for row in rows[-8:]) / 8
    assert abs(mean_strength - plant.planted) < 0.3 * abs(start - plant.planted), [
        round(row[plant.name], 2) for row in rows
    ]
