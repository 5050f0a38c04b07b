"""Tiny data that can be learned, in place of the data sets that the scripts read: images of classes, and running text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def images(n: int, seed: int, channels: int = 3, size: int = 16, classes: int = 4) -> TensorDataset:
    """A pattern for each class, under noise. Different seeds give different examples of the same classes."""
    patterns = torch.randn(classes, channels, size, size, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(classes, (n,), generator=generator)
    return TensorDataset(0.7 * patterns[labels] + torch.randn(n, channels, size, size, generator=generator), labels)


def text(n: int, seed: int, words: int = 12) -> Tensor:
    """Numbers of words, (n,): the next word is five times the present one and one, or, one time in five, any."""
    generator = torch.Generator().manual_seed(seed)
    random, strays = torch.randint(words, (n,), generator=generator), torch.rand(n, generator=generator) < 0.2
    result = random.tolist()
    for i in range(1, n):
        if not strays[i]:
            result[i] = (5 * result[i - 1] + 1) % words
    return torch.tensor(result)
