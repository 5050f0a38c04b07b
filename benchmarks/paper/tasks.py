"""The paper's networks, hyperparameters and budgets (Sec. 5.2, Table 1; where it is silent, the published implementation)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from benchmarks.trials import Task
from benchmarks.tuning import SimpleCNN, small_resnet18
from fxstn import hp
from fxstn.tools import data

START = 0.05  # of dropout, jitter and shifts


@dataclass(frozen=True)
class Budget:
    """Images to train and to validate with (None: the paper's), epochs of a run, minutes after which a run ends and no trial
    of a search begins (None: no limit; a search then has `trials`)."""

    train: int | None
    valid: int | None
    epochs: int
    minutes: float | None = None
    trials: int = 20


def mlp() -> nn.Module:
    """Three hidden layers of 1200 units; dropout at the input and after the first two."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 1200),
                         nn.ReLU(), nn.Linear(1200, 10))  # fmt: skip


def _plain(convolutions: Sequence[nn.Module], sizes: Sequence[int]) -> nn.Module:
    """Convolutions, then linear layers of these sizes with ReLU between them."""
    linear = [layer for a, b in itertools.pairwise(sizes[:-1]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Sequential(*convolutions), nn.Flatten(), nn.Sequential(*linear, nn.Linear(*sizes[-2:])))


def alexnet() -> nn.Module:
    """For 32×32 images: five 3×3 convolutions, pools after the first, second and last, 1024-4096-4096-10."""
    layers: list[nn.Module] = []
    for number, (inputs, filters) in enumerate(((3, 64), (64, 192), (192, 384), (384, 256), (256, 256))):
        layers += [nn.Conv2d(inputs, filters, 3, 2 if number == 0 else 1, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number in (0, 1, 4) else []
    return _plain(layers, (1024, 4096, 4096, 10))


def vgg16(width: int = 64) -> nn.Module:
    """Without batch norm: 13 convolutions of `width` filters and more, then linear layers as wide as the last of them.

    The initial weights of convolutions are those of torchvision's VGG. With torch's own it does not begin to learn.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for times, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, times * width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layers[-2].bias)
            inputs = times * width
        layers.append(nn.MaxPool2d(2))
    return _plain(layers, (inputs, inputs, inputs, 10))


def _after(model: nn.Module, kind: type[nn.Module], but: int) -> list[str]:
    """Names of the ReLUs after layers of a kind, but those of the last `but`."""
    names = [name for name, _ in model.named_modules()]
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    return [names[names.index(name) + 1] for name in (found[:-but] if but else found)]


def _cifar(network: Callable[[], nn.Module]) -> nn.Module:
    """Images in [0, 1], augmented before they are normalised."""
    return nn.Sequential(v2.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), network())


def _cifar_specs(network: Callable[[], nn.Module], start: float, scale: float) -> list[hp.Spec]:
    """Dropout at the input and after each layer or block, colour, affine maps, Cutout: 18, 26 and 19 in all."""
    model = _cifar(network)
    blocks = [name for name, module in model.named_modules() if isinstance(module, BasicBlock)]
    sites = blocks or [*_after(model, nn.Conv2d, 0), *_after(model, nn.Linear, 1)]
    affine = {name: 100 * START if name in ("rotation", "shear") else START for name in hp.Affine.numbers}
    return [
        hp.ColorJitter("input", init=dict.fromkeys(hp.ColorJitter.numbers, START), scale=scale),
        hp.Affine("input", init=affine, scale=scale),
        hp.Cutout("input", init={"holes": 1, "length": 4}, scale=scale),
        hp.Dropout("input", *sites, init=start, scale=scale),
    ]


def _steps(optimizer: torch.optim.Optimizer, epochs: int) -> Any:
    """A fifth of the rate after 30, 60 and 90 % of the epochs (the paper's 60, 120 and 180 of 200)."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(share * epochs) for share in (0.3, 0.6, 0.9)], 0.2)


@dataclass(frozen=True)
class Row:
    """A row of Table 1. data: as in `fxstn.tools.data`. rate: of SGD with momentum. figures: the paper's
    validation (test) losses. full: the network of that budget, where it is another."""

    data: str
    network: Callable[[], nn.Module]
    specs: Callable[[float, float], list[hp.Spec]]
    rate: float
    budgets: dict[str, Budget]
    figures: dict[str, tuple[float, float]]
    entropy_weight: float = 1e-3
    full: Callable[[], nn.Module] | None = None


METHODS = ("untuned", "random", "bayes", "stn", "centered", "delta", "default")
PUBLISHED = ("random", "bayes", "stn", "centered", "delta")


def _figures(*pairs: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict(zip(PUBLISHED, pairs, strict=True))


def _grey_dropout(*sites: str) -> Callable[[float, float], list[hp.Spec]]:
    return lambda start, scale: [hp.Dropout("input", *sites, init=start, scale=scale)]


def _fashion_specs(start: float, scale: float) -> list[hp.Spec]:
    cutout = hp.Cutout("input", init={"holes": 1, "length": 4}, scale=scale)
    return [hp.Dropout("input", "3", "7", "11", init=start, scale=scale), cutout]


TINY = Budget(200, 100, 2, trials=2)
CIFAR_FULL = Budget(40_000, 10_000, 200)
ROWS = {
    "mnist": Row(
        "mnist", mlp, _grey_dropout("2", "4"), 1e-2,
        {"tiny": TINY, "small": Budget(5000, 1000, 60, 3.0), "full": Budget(51_000, 9_000, 300)},
        _figures((0.043, 0.042), (0.042, 0.043), (0.043, 0.041), (0.041, 0.039), (0.040, 0.038)),
    ),
    "fmnist": Row(
        "fashion-mnist", SimpleCNN, _fashion_specs, 1e-2,
        {"tiny": TINY, "small": Budget(5000, 1000, 40, 4.0), "full": Budget(51_000, 9_000, 300)},
        _figures((0.206, 0.214), (0.217, 0.215), (0.196, 0.218), (0.191, 0.212), (0.189, 0.209)),
        full=partial(SimpleCNN, 32, 64),
    ),
    **{
        f"cifar10-{name}": Row(
            "cifar10", partial(_cifar, network), partial(_cifar_specs, network), 3e-2,
            {"tiny": TINY, "small": Budget(4000, 1000, 15, 12.0), "full": CIFAR_FULL}, figures,
            1e-4 if name == "vgg16" else 1e-3, full and partial(_cifar, full),
        )
        for name, network, full, figures in (
            ("alexnet", alexnet, None,
             _figures((0.631, 0.671), (0.594, 0.598), (0.474, 0.488), (0.431, 0.450), (0.425, 0.446))),
            ("vgg16", partial(vgg16, 32), vgg16,  # likewise
             _figures((0.566, 0.595), (0.421, 0.446), (0.330, 0.354), (0.286, 0.321), (0.272, 0.296))),
            ("resnet18", partial(small_resnet18, stride=2), small_resnet18,  # a quarter of the work where it is not full
             _figures((0.264, 0.298), (0.230, 0.267), (0.266, 0.312), (0.222, 0.258), (0.204, 0.238))),
        )
    },
}  # fmt: skip


def _sets(name: str, budget: Budget, seed: int, root: str | None) -> Sequence[TensorDataset]:
    grey = name != "cifar10"
    split = data.load(name, 28 if grey else 32, budget.train, budget.valid, seed, root, normalise=grey)
    sets = (split.train, split.valid, split.test)
    return [TensorDataset(s.tensors[0][:, :1].contiguous(), s.tensors[1]) for s in sets] if grey else sets


def task(row: str, budget_name: str, scale: float = 1.0) -> Task:
    """A row at a budget, for benchmarks.trials; σ = scale at the start."""
    spec, budget = ROWS[row], ROWS[row].budgets[budget_name]
    decays = {"optimizer": partial(_steps, epochs=budget.epochs)} if spec.data == "cifar10" else {}
    network = (spec.full if budget_name == "full" else None) or spec.network
    hyper = {"warmup_epochs": min(5, budget.epochs // 3), "entropy_weight": spec.entropy_weight}
    return Task(
        partial(_sets, spec.data, budget),
        lambda train: network(),
        lambda start: spec.specs(start, scale),
        F.cross_entropy,
        partial(torch.optim.SGD, lr=spec.rate, momentum=0.9),
        budget.epochs,
        128,
        {"schedulers": decays},
        {"schedulers": decays | ({"response.optimizer": decays["optimizer"]} if decays else {})},
        hyper,
    )
