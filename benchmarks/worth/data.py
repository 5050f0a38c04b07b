"""Data sets of the tasks: scikit-learn's own, and images, tables and text under the folder that FXSTN_DATA names.

FXSTN_DATA/NAME/*-ubyte.gz (mnist, fashion-mnist; or torchvision's NAME/raw), cifar10/*.webp (mosaics of 100 × 100 images, with
train_labels.npy; or cifar-10-batches-bin), uci/NAME.npz (X, y), ptb/ptb.{train,valid,test}.txt.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

Sets = tuple[TensorDataset, TensorDataset, TensorDataset]
RAW = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
TEST = 2000  # images
LETTERS = " abcdefghijklmnopqrstuvwxyz'.-$&0123456789/#*<>\\\nN"
# The word that was removed, of frequent ones on the topic of the Wall Street Journal.
REMOVED = ("company", "market", "president", "government", "stock", "year", "bank", "sales", "program", "trading")


def root() -> Path:
    """Raises FileNotFoundError where FXSTN_DATA is not set."""
    if (folder := os.environ.get("FXSTN_DATA")) is None:
        raise FileNotFoundError("this task needs the variable FXSTN_DATA, a folder with mnist, cifar10, uci or ptb")
    return Path(folder)


def shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _idx(path: Path) -> Tensor:
    """An array of bytes in MNIST's format: a magic number, the sizes, the values."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = np.frombuffer(data, ">i4", data[3], 4)
    return torch.tensor(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes))


@cache
def grey(name: str, training: bool) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28), uint8, and classes of mnist or fashion-mnist."""
    part = "train" if training else "t10k"
    names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    places = [root() / name / f"{file}.gz" for file in names]
    if not places[0].exists():
        places = [root() / RAW[name] / file for file in names]
    images, labels = map(_idx, places)
    return images.unsqueeze(1), labels.long()


@cache
def colour(training: bool) -> tuple[Tensor, Tensor]:
    """Images (10,000, 3, 32, 32), uint8, and classes of CIFAR-10: the first batch of training, or the test set."""
    name = "data_batch_1" if training else "test_batch"
    if (binary := root() / "cifar-10-batches-bin" / f"{name}.bin").exists():
        rows = torch.from_file(str(binary), size=binary.stat().st_size, dtype=torch.uint8).view(-1, 3073)
        return rows[:, 1:].view(-1, 3, 32, 32), rows[:, 0].long()
    from PIL import Image

    mosaic = torch.tensor(np.asarray(Image.open(root() / "cifar10" / f"{name}.webp").convert("RGB")))
    images = mosaic.view(100, 32, 100, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    labels = np.load(root() / "cifar10" / f"{'train' if training else 'test'}_labels.npy")[:10_000]
    return images, torch.tensor(labels).long()


def images(name: str, train: int, valid: int, seed: int, classes: Sequence[int] = tuple(range(10))) -> Sets:
    """Images in [0, 1] of some classes, which are numbered from 0; the test set is the same for every seed."""
    sources = [colour(training) if name == "cifar10" else grey(name, training) for training in (True, False)]
    numbers = torch.full((10,), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    places = [(numbers[y] >= 0).nonzero().squeeze(1) for _, y in sources]
    order = places[0][shuffled(len(places[0]), seed)]
    parts = (0, order[:train]), (0, order[train : train + valid]), (1, places[1][:TEST])
    return tuple(TensorDataset(sources[i][0][part] / 255, numbers[sources[i][1][part]]) for i, part in parts)  # type: ignore[return-value]


def table(name: str, train: int, valid: int, seed: int, test: int | None = None) -> Sets:
    """Rows of a table, standardised by the training part; targets of a regression too. The rest is the test set.

    name: of scikit-learn's sets (breast_cancer, wine, digits, diabetes), or of a file uci/NAME.npz.
    """
    if name in ("breast_cancer", "wine", "digits", "diabetes"):
        from sklearn import datasets

        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    else:
        with np.load(root() / "uci" / f"{name}.npz") as arrays:
            X, y = arrays["X"], arrays["y"].reshape(-1)
    order = shuffled(len(y), seed).numpy()
    stop = None if test is None else train + valid + test
    parts = order[:train], order[train : train + valid], order[train + valid : stop]
    X = (X - X[parts[0]].mean(0)) / (X[parts[0]].std(0) + 1e-6)
    if np.issubdtype(y.dtype, np.integer):
        return tuple(TensorDataset(torch.tensor(X[p]).float(), torch.tensor(y[p]).long()) for p in parts)  # type: ignore[return-value]
    y = ((y - y[parts[0]].mean()) / y[parts[0]].std())[:, None]
    return tuple(TensorDataset(torch.tensor(X[p]).float(), torch.tensor(y[p]).float()) for p in parts)  # type: ignore[return-value]


def _treebank(part: str) -> str:
    return (root() / "ptb" / f"ptb.{part}.txt").read_text()


def _windows(codes: Tensor, length: int) -> TensorDataset:
    """(what stands at each place, what stands at the next one), both (n, length)."""
    count = (len(codes) - 1) // length
    return TensorDataset(codes[: count * length].view(-1, length), codes[1 : count * length + 1].view(-1, length))


def characters(train: int, valid: int, length: int, seed: int) -> Sets:
    """Windows of Penn Treebank's characters: so many of its training text from a place that the seed draws; what follows
    validates."""
    numbers = {letter: i for i, letter in enumerate(LETTERS)}
    text, test = _treebank("train"), _treebank("test")[:60_000]
    begin = 10_000 * int(shuffled(400, seed)[0])
    ends = begin + train, begin + train + valid
    parts = text[begin : ends[0]], text[ends[0] : ends[1]], test
    return tuple(_windows(torch.tensor([numbers.get(c, 0) for c in part]), length) for part in parts)  # type: ignore[return-value]


@cache
def vocabulary(size: int) -> dict[str, int]:
    """{word: its number} of the most frequent words of Penn Treebank; 0 stands for all others and for no word."""
    counts = Counter(_treebank("train").split())
    return {word: i + 1 for i, (word, _) in enumerate(counts.most_common(size - 1))}


def words(train: int, valid: int, length: int, size: int, seed: int) -> Sets:
    """Windows of Penn Treebank's words, as `characters`."""
    numbers = vocabulary(size)
    text, test = _treebank("train").split(), _treebank("test").split()[:20_000]
    begin = 1000 * int(shuffled(800, seed)[0])
    ends = begin + train, begin + train + valid
    parts = text[begin : ends[0]], text[ends[0] : ends[1]], test
    return tuple(_windows(torch.tensor([numbers.get(w, 0) for w in part]), length) for part in parts)  # type: ignore[return-value]


@cache
def _gaps(part: str, size: int, length: int) -> tuple[Tensor, Tensor]:
    numbers, classes, rows, labels = vocabulary(size), {w: i for i, w in enumerate(REMOVED)}, [], []
    for line in _treebank(part).split("\n"):
        sentence = line.split()
        places = [i for i, word in enumerate(sentence) if word in classes]
        if len(places) == 1 and 6 <= len(sentence) <= length:
            codes = [0 if i == places[0] else numbers.get(word, 0) for i, word in enumerate(sentence)]
            codes = [code for i, code in enumerate(codes) if i != places[0]]
            rows.append(codes + [0] * (length - len(codes)))
            labels.append(classes[sentence[places[0]]])
    return torch.tensor(rows), torch.tensor(labels)


def gaps(train: int, valid: int, size: int, seed: int, length: int = 40) -> Sets:
    """Sentences of Penn Treebank from which the only word of REMOVED was taken out; which one it was is the class."""
    (x, y), (x_test, y_test) = _gaps("train", size, length), _gaps("test", size, length)
    order = shuffled(len(y), seed)
    test = TensorDataset(torch.cat([x_test, x[order[-1500:]]]), torch.cat([y_test, y[order[-1500:]]]))
    parts = order[:train], order[train : train + valid]
    return *(TensorDataset(x[part], y[part]) for part in parts), test  # type: ignore[return-value]
