"""Image data sets for the command line: scikit-learn's digits, which need no download, and torchvision's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fxstn.ir.input_errors import as_path
from fxstn.tools.choices import DATA_SETS


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of (image, class), with images (3, size, size) of floating point, and the number of classes."""

    train: TensorDataset
    valid: TensorDataset
    test: TensorDataset
    classes: int


def load(
    name: str, image_size: int = 32, train: int | None = None, valid: int | None = None, seed: int = 0,
    root: str | None = None, normalise: bool = True,
) -> Split:  # fmt: skip
    """Images of a data set, shuffled by the seed and split.

    name: "digits" are scikit-learn's 1,797 images; what training and validation leave is the test set. The others come from
        torchvision and have a test set of their own. CIFAR-10 is also read from its binary version (cifar-10-batches-bin).
    image_size: pixels; images are scaled to it and have three channels.
    train, valid: sizes. None: 500 each of the digits; of the others 15 % of the training images validate, the rest trains.
    seed: of the order.
    root: folder of torchvision's data, downloaded there where it is missing; None: the variable FXSTN_DATA.
    normalise: to mean 0 and variance 1 of the training images; else they stay in [0, 1].

    Raises ValueError for another name and for sizes that do not fit.
    """
    for what, size in {"image_size": image_size, "train": train, "valid": valid}.items():
        if size is not None and size < 1:
            raise ValueError(f"{what}={size} must be at least 1")
    if name == "digits":
        images, labels = _digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, valid = train or 500, valid or 500
        if train + valid >= len(labels):
            raise ValueError(
                f"digits has {len(labels)} images, too few for train={train} and valid={valid} and a test set"
            )
        parts = order[:train], order[train : train + valid], order[train + valid :]
        sets = [(images[part], labels[part]) for part in parts]
    elif name in DATA_SETS:
        sets = _torchvision(name, train, valid, seed, root or os.environ.get("FXSTN_DATA"))
    else:
        raise ValueError(f"data set {name!r} is not one of {', '.join(DATA_SETS)}")
    mean, std = (sets[0][0].mean(), sets[0][0].std()) if normalise else (torch.zeros(()), torch.ones(()))
    prepared = [TensorDataset(_prepare(x, image_size, mean, std), y) for x, y in sets]
    return Split(prepared[0], prepared[1], prepared[2], classes=10)


def loader(
    dataset: Dataset, batch_size: int, seed: int, workers: int = 0, collate: Callable[..., object] | None = None
) -> DataLoader:
    """Batches in an order that only the seed decides.

    workers: processes that load them.
    collate: makes a batch of examples; None: as torch does.
    """
    order = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, generator=order, num_workers=workers, collate_fn=collate)


def _prepare(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    images = (images - mean) / std
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1).contiguous()


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'fxstn[data]'") from error
    digits = load_digits()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)


def photographs(size: int = 96) -> Tensor:
    """The middle squares of scikit-learn's two photographs, scaled to (2, 3, size, size), in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("the photographs come with scikit-learn: pip install 'fxstn[data]'") from error
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).movedim(-1, 1) / 255
    side, left = images.shape[2], (images.shape[3] - images.shape[2]) // 2
    return F.interpolate(images[..., left : left + side], size=(size, size), mode="area")


def _cifar10_binary(folder: Path, training: bool) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in [0, 1] and classes from CIFAR-10's binary version.

    A record is one byte for the class and 3,072 for the pixels.
    Raises ValueError where a file is missing or not made of whole records.
    """
    records = []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] if training else ["test_batch.bin"]:
        try:
            records.append(torch.from_file(str(folder / name), size=(folder / name).stat().st_size, dtype=torch.uint8))
        except OSError as error:
            raise ValueError(f"{folder} lacks {name}: {error}") from error
        if records[-1].numel() % 3073:
            raise ValueError(f"{folder / name} is not CIFAR-10's binary version: its size is no multiple of 3,073")
    rows = torch.cat(records).view(-1, 3073)
    return rows[:, 1:].view(-1, 3, 32, 32) / 255, rows[:, 0].long()


def _torchvision(
    name: str, train: int | None, valid: int | None, seed: int, root: str | None
) -> list[tuple[Tensor, Tensor]]:
    from torchvision import datasets

    if root is None:
        raise ValueError(
            f"--data {name} needs --data-root DIR (or the variable FXSTN_DATA): where to find or download it"
        )
    dataset = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]

    def tensors(training: bool) -> tuple[Tensor, Tensor]:
        if name == "cifar10" and (folder := as_path(root, "--data-root") / "cifar-10-batches-bin").is_dir():
            return _cifar10_binary(folder, training)
        try:
            part = dataset(root, train=training, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{name} is not under {root} and cannot be downloaded there: {error}") from error
        images = torch.as_tensor(part.data).float() / 255
        return (images.permute(0, 3, 1, 2) if images.dim() == 4 else images.unsqueeze(1)), torch.as_tensor(part.targets)

    images, labels = tensors(True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    valid = valid or int(0.15 * len(labels))
    train = train or len(labels) - valid
    if train + valid > len(labels):
        raise ValueError(f"{name} has {len(labels)} training images, too few for train={train} and valid={valid}")
    return [*((images[part], labels[part]) for part in (order[:train], order[train : train + valid])), tensors(False)]
