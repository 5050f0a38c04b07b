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
