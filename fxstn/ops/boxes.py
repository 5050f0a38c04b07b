"""Boxes and points in an image, in pixels from its top left corner, and where a map of the image takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PointMap = Callable[[Tensor], Tensor]  # (batch, n, 2) → where the points go


def moved_boxes(boxes: Tensor, move: PointMap, size: tuple[int, int]) -> Tensor:
    """The smallest boxes around the moved corners of boxes, cut at the borders of the image.

    boxes: (batch, n, 4), x1, y1, x2, y2.
    size: (H, W).

    Returns a tensor like boxes; one that left the image has no area.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], -1)
    moved = move(corners.flatten(1).unflatten(1, (-1, 2))).view(*boxes.shape[:2], 4, 2)
    x, y = moved.unbind(-1)
    height, width = size
    x, y = x.clamp(0, width), y.clamp(0, height)
    return torch.stack([x.amin(-1), y.amin(-1), x.amax(-1), y.amax(-1)], -1).to(boxes.dtype)


def has_area(boxes: Tensor, least: float = 1.0) -> Tensor:
    """Which boxes (..., 4) are at least so many pixels wide and high, as `v2.SanitizeBoundingBoxes` keeps them: bool (...)."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def moved_keypoints(points: Tensor, move: PointMap, size: tuple[int, int]) -> Tensor:
    """Keypoints (batch, n, k, 2 or 3), x, y and, where there are three, visibility, which is 0 outside of the image.

    size: (H, W).
    """
    batch, count, each, _ = points.shape
    places = move(points[..., :2].reshape(batch, count * each, 2)).view(batch, count, each, 2).to(points.dtype)
    x, y = places.unbind(-1)
    inside = (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])
    rest = points[..., 2:] * inside[..., None]
    return torch.cat([places, rest], -1)
