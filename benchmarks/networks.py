"""The networks of the overhead suite that torchvision's own builders do not make in this size."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torchvision import models


def mlp(num_classes: int) -> nn.Sequential:
    """Three hidden layers of 1200 (the paper's MNIST network) on 32 × 32 colour images."""
    widths = (3 * 32 * 32, 1200, 1200, 1200)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1200, num_classes))


def vit_b_16(num_classes: int) -> nn.Module:
    """torchvision's vit_b_16 for 64 × 64 images: 16 patches and the class token."""
    return models.vit_b_16(image_size=64, num_classes=num_classes)


def three_layers(num_classes: int) -> nn.Sequential:
    """Two hidden layers of 1024 on 32 × 32 colour images: little but launches."""
    widths = (3 * 32 * 32, 1024, 1024)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, num_classes))


def narrow_mlp(num_classes: int) -> nn.Sequential:
    """Three layers of 16 units on 8 × 8 colour images: the host decides how long a step takes, here and in what follows."""
    widths = (3 * 8 * 8, 16, 16)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, num_classes))


def narrow_cnn(num_classes: int) -> nn.Sequential:
    """Twelve convolutions of 4 channels, each with a batch norm."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(12)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))  # fmt: skip


def narrow_vit(num_classes: int) -> nn.Module:
    """Six blocks of a vision transformer with 16 features, on 8 × 8 colour images."""
    return models.VisionTransformer(8, 4, 6, 2, 16, 32, num_classes=num_classes)
