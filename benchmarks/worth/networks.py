"""Small networks of the tasks. Every dropout is a module of torch, so that plain training and tuning share its places."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norms, beside the input or a 1×1 convolution of it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(inputs, width, 1, stride, bias=False) if stride > 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class Normalize(nn.Module):
    """(x - mean) / deviation, for images in [0, 1]."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def resnet(channels: int, widths: tuple[int, ...], dropout: float, classes: int = 10) -> nn.Module:
    """A stem of stride 2, a residual block from each width to the next, of stride 2 where they differ; dropout before the last
    block and before the linear layer."""
    blocks = [Residual(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
    stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    return nn.Sequential(
        Normalize(0.4, 0.3), stem, *blocks[:-1], nn.Dropout(dropout), blocks[-1],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(widths[-1], classes),
    )  # fmt: skip


def cnn(dropout: float, classes: int = 10) -> nn.Module:
    """Two 3×3 convolutions, pools, two linear layers, without norms."""
    return nn.Sequential(
        Normalize(0.3, 0.35), nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(dropout), nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(128, classes),
    )  # fmt: skip


def mlp(
    sizes: tuple[int, ...], dropout: float, norm: Callable[[int], nn.Module] | None = None, first: bool = False
) -> nn.Module:
    """Linear layers, each but the last with a norm, ReLU and dropout. first: dropout at the input, too."""
    layers: list[nn.Module] = [nn.Dropout(dropout)] if first else []
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Block(nn.Module):
    """Self-attention and an MLP, each behind a layer norm, with dropout before the residual sum."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.ln1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop1(self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop2(self.down(F.gelu(self.up(self.ln2(x)))))


class GPT(nn.Module):
    """(batch, length) characters → (batch, length, letters) scores of the next one."""

    def __init__(self, letters: int, length: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(letters, width), nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.drop(self.tokens(words) + self.places))))


class ViT(nn.Module):
    """Patches of 7 × 7 of grey images → classes, by the mean over the patches."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float, classes: int = 10) -> None:
        super().__init__()
        self.normalize, self.patches = Normalize(0.3, 0.35), nn.Conv2d(1, width, 7, 7)
        self.places, self.drop = nn.Parameter(0.02 * torch.randn(16, width)), nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.normalize(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.drop(x + self.places))).mean(1))


class TextClassifier(nn.Module):
    """Embeddings, a convolution over five words, its maximum over the sentence, a linear layer."""

    def __init__(self, words: int, width: int, dropout: float, classes: int) -> None:
        super().__init__()
        self.embedding, self.drop1 = nn.Embedding(words, width), nn.Dropout(dropout)
        self.conv, self.drop2 = nn.Conv1d(width, 2 * width, 5, padding=2), nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, words: Tensor) -> Tensor:
        x = self.drop1(self.embedding(words)).transpose(1, 2)
        return self.head(self.drop2(F.relu(self.conv(x)).amax(2)))


class WordLSTM(nn.Module):
    """(batch, length) words → (batch, length, words) scores of the next one."""

    def __init__(self, words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.drop1 = nn.Embedding(words, width), nn.Dropout(dropout)
        self.rnn, self.drop2 = nn.LSTM(width, width, batch_first=True), nn.Dropout(dropout)
        self.head = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.drop2(self.rnn(self.drop1(self.embedding(words)))[0]))
