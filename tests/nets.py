"""Small networks that the tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxstn.ops.response import Response


def mlp(dropout: float = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, 3),
    )


class SmallConv(nn.Module):
    """Convolutions (grouped, strided, dilated, reflected), optional batch norm, a residual, a joined branch."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.left = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.right = nn.Conv2d(8, 4, 1, stride=2)
        self.act = nn.SiLU()
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.stem(x)))
        y = self.bn2(self.grouped(x))
        y += x
        x = torch.cat([self.left(y), self.right(y)], dim=1)
        x = self.pool(self.act(x))
        return self.head(x.mean([2, 3]))


class Classifier(nn.Module):
    """LeNet's shape: convolutions, max pooling, view, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv(x)), 2)
        x = x.view(-1, 4 * 3 * 3)
        return self.fc(F.dropout(x, 0.3, self.training))


def randomize_response(stn: nn.Module, scale: float = 0.3) -> None:
    """Responses away from their start, where they predict nothing."""
    with torch.no_grad():
        for module in stn.modules():
            if isinstance(module, Response):
                module.U.normal_(std=scale)


def tiny_conv(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(4, num_classes),
    )  # fmt: skip


class Double(torch.autograd.Function):
    """A custom function whose backward is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g
