"""The tasks: what is trained on what, and the usual recipe for it.

A task trains for so many epochs that one plain run takes seconds of one thread. Some overfit in them, some still learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.worth import data
from benchmarks.worth.data import Sets
from benchmarks.worth.networks import GPT, TextClassifier, ViT, WordLSTM, cnn, mlp, resnet
from fxstn import hp

STARTS = ("low", "recipe", "high")
# What is usually tried: (low, the usual recipe, high). Dropout's recipe is the task's own.
STRENGTHS: dict[str, tuple[float, float, float]] = {
    "weight_decay": (1e-5, 5e-4, 1e-2), "flip": (0.05, 0.5, 0.8), "rotation": (2, 10, 30), "translate": (0.02, 0.1, 0.3),
    "scale": (0.02, 0.1, 0.3), "shear": (2, 5, 30), "holes": (1, 1, 3), "length": (2, 8, 14),
}  # fmt: skip
DROPOUTS = (0.02, 0.6)  # the low and the high start of dropout


@dataclass(frozen=True)
class Task:
    """sets(seed): training, validation and test set. network(): draws its weights from torch's generator.

    optimizer(params, weight_decay): of plain training; a task without `decay` keeps `own_decay` throughout.
    dropout: the recipe's rate, of every dropout module. decay: whether weight decay is part of the recipe, and is tuned.
    augmentations: of images in [0, 1], at the input. usual: what the recipe has in place of STRENGTHS.
    metric: accuracy, or the root of the mean square. images: whether an augmentation of images makes sense.
    """

    says: str
    sets: Callable[[int], Sets]
    network: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    dropout: float
    epochs: int
    batch: int
    decay: bool = True
    own_decay: float = 0.0
    augmentations: tuple[type[hp.Operation], ...] = ()
    usual: Mapping[str, float] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: str = "accuracy"
    images: bool = False

    def strengths(self, start: str) -> dict[str, float]:
        """{"dropout": rate of every dropout module, "weight_decay": …, "flip": …, …} at a start."""
        place = STARTS.index(start)
        names = [name for operation in self.augmentations for name in operation.numbers]
        rates = DROPOUTS[0], self.dropout, DROPOUTS[1]
        decay = {"weight_decay": STRENGTHS["weight_decay"][place]} if self.decay else {}
        values = {"dropout": rates[place], **decay, **{name: STRENGTHS[name][place] for name in names}}
        return values | (dict(self.usual) if start == "recipe" else {})

    def specs(self, network: nn.Module, start: str) -> list[hp.Spec]:
        """What fxstn tunes, from a start: a number for each dropout module, one weight decay, each augmentation."""
        values = self.strengths(start)
        places = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
        operations = [kind("input", init={n: values[n] for n in kind.numbers}) for kind in self.augmentations]
        decay = [hp.WeightDecay("*", shared=True, init=values["weight_decay"])] if self.decay else []
        return [*operations, hp.Dropout(*places, init=values["dropout"]), *decay]


def flattened_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over all places of all sequences."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _adam(params: object, weight_decay: float = 0.0, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]


def _adamw(params: object, weight_decay: float = 0.0, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]


def _sgd(params: object, weight_decay: float = 0.0, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay)  # type: ignore[arg-type]


@cache
def _pretrained(build: Callable[..., nn.Module], name: str, classes: tuple[int, ...]) -> Mapping[str, Tensor]:
    """The weights of a network trained on 6,000 images of some classes; the same for every run and seed."""
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        network, (train, _, _) = build(0.0, len(classes)), data.images(name, 6000, 1, 12345, classes)
        x, y = train.tensors
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for part in (part for _ in range(3) for part in torch.randperm(len(y)).split(64)):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    return network.state_dict()


def _fine_tuned(
    build: Callable[..., nn.Module], dropout: float, new: int, name: str, classes: tuple[int, ...]
) -> nn.Module:
    """A network pre-trained on some classes, with a fresh last layer for `new` ones."""
    network, weights = build(dropout, new), _pretrained(build, name, classes)
    last = f"{len(network) - 1}."  # type: ignore[arg-type]
    network.load_state_dict({key: w for key, w in weights.items() if not key.startswith(last)}, strict=False)
    return network


def _grey_resnet(dropout: float, classes: int = 10) -> nn.Module:
    return resnet(1, (8, 8, 16, 32), dropout, classes)


FASHION = Task(
    "small ResNet with batch norm, 1,500 + 500 images of FashionMNIST",
    partial(data.images, "fashion-mnist", 1500, 500), partial(resnet, 1, (8, 16, 32), 0.2),
    partial(_sgd, lr=0.03), 0.2, 20, 50, images=True,
)  # fmt: skip
FINE = Task(
    "CNN without norms that knows MNIST, fine-tuned on 300 + 150 images of FashionMNIST",
    partial(data.images, "fashion-mnist", 300, 150), partial(_fine_tuned, cnn, 0.5, 10, "mnist", tuple(range(10))),
    _adam, 0.5, 30, 30, images=True,
)  # fmt: skip
PUT_IN = (hp.Affine, hp.Cutout)

TASKS: dict[str, Task] = {
    "fashion-resnet": FASHION,
    "fashion-resnet-augmented": replace(FASHION, says=f"{FASHION.says}, affine maps and Cutout", augmentations=PUT_IN),
    "fine-tuned-cnn": FINE,
    "fine-tuned-cnn-augmented": replace(FINE, says=f"{FINE.says}, affine maps and Cutout", augmentations=PUT_IN),
    "fine-tuned-resnet": Task(
        "ResNet with batch norm that knows five classes of FashionMNIST, fine-tuned on 200 + 100 images of the other five",
        partial(data.images, "fashion-mnist", 200, 100, classes=(0, 1, 2, 3, 4)),
        partial(_fine_tuned, _grey_resnet, 0.5, 5, "fashion-mnist", (5, 6, 7, 8, 9)),
        partial(_sgd, lr=0.01), 0.5, 30, 25, images=True,
    ),
    "breast-cancer": Task(
        "MLP with batch norm, 150 + 75 rows of 30 numbers", partial(data.table, "breast_cancer", 150, 75),
        partial(mlp, (30, 64, 64, 2), 0.2, nn.BatchNorm1d), _adam, 0.2, 40, 25,
    ),
    "cifar-resnet": Task(
        "small ResNet with batch norm, 2,000 + 500 images of CIFAR-10, flips and shifts",
        partial(data.images, "cifar10", 2000, 500), partial(resnet, 3, (8, 16, 32), 0.2),
        partial(_sgd, lr=0.03), 0.2, 15, 50, augmentations=(hp.Flip, hp.Affine),
        usual={"translate": 0.125, "rotation": 2, "scale": 0.02, "shear": 2}, images=True,
    ),
    "gpt": Task(
        "transformer with layer norms on 24,000 + 8,000 characters of Penn Treebank",
        partial(data.characters, 24_000, 8_000, 48), partial(GPT, len(data.LETTERS), 48, 48, 2, 4, 0.1),
        partial(_adamw, lr=2e-3), 0.1, 12, 20, decay=False, own_decay=0.01, loss=flattened_cross_entropy,
    ),
    "removed-word": Task(
        "convolution over words: which of ten words was taken out of a sentence of Penn Treebank, 2,000 + 600 sentences",
        partial(data.gaps, 2000, 600, 3000), partial(TextClassifier, 3000, 32, 0.5, len(data.REMOVED)),
        partial(_adam, lr=2e-3), 0.5, 15, 40,
    ),
    "kin8nm": Task(
        "MLP with batch norm, 800 + 400 rows of 8 numbers, regression", partial(data.table, "kin8nm", 800, 400),
        partial(mlp, (8, 128, 128, 1), 0.1, nn.BatchNorm1d), _adam, 0.1, 40, 32, loss=F.mse_loss, metric="rmse",
    ),
    "vit": Task(
        "ViT with layer norms, 2,000 + 500 images of FashionMNIST, flips and affine maps",
        partial(data.images, "fashion-mnist", 2000, 500), partial(ViT, 32, 2, 4, 0.1),
        partial(_adamw, lr=2e-3), 0.1, 15, 50, decay=False, own_decay=0.01, augmentations=(hp.Flip, hp.Affine),
        images=True,
    ),
    "lstm": Task(
        "LSTM over 20,000 + 5,000 words of Penn Treebank, the next of the 500 most frequent",
        partial(data.words, 20_000, 5_000, 20, 500), partial(WordLSTM, 500, 64, 0.5),
        partial(_adam, lr=5e-3), 0.5, 12, 20, decay=False, loss=flattened_cross_entropy,
    ),
    "protein": Task(
        "MLP without norms, 36,000 + 4,000 rows of 9 numbers, regression",
        partial(data.table, "protein-tertiary-structure", 36_000, 4_000), partial(mlp, (9, 64, 64, 1), 0.1),
        _adam, 0.1, 8, 100, loss=F.mse_loss, metric="rmse",
    ),
    "digits": Task(
        "MLP with layer norms, 300 + 150 images of 8 × 8 digits as rows of 64 numbers",
        partial(data.table, "digits", 300, 150), partial(mlp, (64, 128, 128, 10), 0.5, nn.LayerNorm, True),
        _adam, 0.5, 40, 25,
    ),
}  # fmt: skip
