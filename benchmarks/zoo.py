"""Every model that torchvision lists, the quantised ones aside, small enough to differentiate on two CPU cores."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.video import mvit

_mvit = mvit._mvit
CLASSES = 5
LARGE = 200_000_000  # parameters; above it, repeated blocks are left out
SIZES = {"alexnet": 64, "efficientnet": 64, "inception": 299, "lraspp": 64, "maxvit": 224, "mnasnet": 64, "raft": 128,
         "regnet": 64, "s3d": 224, "shufflenet": 64, "vit_h": 28}  # fmt: skip
DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
BATCHES = {
    "maxvit": 2,
    "s3d": 2,
    **dict.fromkeys(DETECTION, 2),
    "ssdlite": 4,
    "fasterrcnn_resnet50_fpn_v2": 4,
    "maskrcnn_resnet50_fpn_v2": 4,
}  # else 4: batch norm of two values has next to no derivative
SETTINGS: dict[str, dict[str, Any]] = {
    "vit_h": {"image_size": 28},
    "vit": {"image_size": 32},
    "googlenet": {"init_weights": False},
    "inception": {"init_weights": False},
}
FRAMES = {"s3d": 16, "mvit": 4}
VIDEO = ("s3d", "mvit", "r3d", "mc3", "r2plus1d", "swin3d")


def names() -> list[str]:
    """Names of torchvision's models, in its own order."""
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def family(name: str) -> str:
    """What kind of task a model is for: classification, segmentation, video, detection or flow."""
    if name.startswith(DETECTION):
        return "detection"
    if name.startswith("raft"):
        return "flow"
    if name.startswith(VIDEO):
        return "video"
    return "segmentation" if name.startswith(("deeplab", "fcn", "lraspp")) else "classification"


def _of(table: dict[str, Any], name: str, default: Any) -> Any:
    """The entry of the longest prefix of a name."""
    return table.get(max((prefix for prefix in table if name.startswith(prefix)), key=len, default=""), default)


def build(name: str) -> tuple[nn.Module, tuple, bool]:
    """(model with random weights, inputs with a few examples, whether repeated blocks were left out)."""
    kind = family(name)
    settings = dict(_of(SETTINGS, name, {}))
    if kind == "detection":
        model, inputs = _detector(name)
    elif kind == "flow":
        model, inputs = models.get_model(name, weights=None), (*_flow_images(_of(SIZES, name, 128)), 2)
    else:
        if kind == "segmentation":
            settings["weights_backbone"] = None
        with mock.patch.object(mvit, "_mvit", _small_mvit):
            model = models.get_model(name, weights=None, num_classes=CLASSES, **settings)
        size = _of(SIZES, name, 32)
        frames = (_of(FRAMES, name, 4),) if kind == "video" else ()
        inputs = (torch.randn(_of(BATCHES, name, 4), 3, *frames, size, size),)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGE:
        model = shortened(model)
    return model, inputs, count > LARGE


def _small_mvit(*arguments: Any, **settings: Any) -> nn.Module:
    """MViT for 4 frames of 32 × 32: its builders set the size themselves."""
    return _mvit(*arguments, **settings | {"spatial_size": (32, 32), "temporal_size": 4})


def shortened(model: nn.Module) -> nn.Module:
    """A copy in which of several equal blocks in a row (one class, parameters of the same shapes) two remain."""
    model = copy.copy(model)

    def shape(child: nn.Module) -> Any:
        return type(child), [tuple(p.shape) for p in child.parameters()]

    for module in list(model.modules()):
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            kept = [
                child for _, run in groupby(module.named_children(), lambda c: shape(c[1])) for child in list(run)[:2]
            ]
            module._modules = dict(kept)  # type: ignore[assignment]
    return model


def _flow_images(size: int) -> Iterator[Tensor]:
    first = torch.rand(2, 3, size, size) * 2 - 1
    yield first
    yield first.roll(2, -1)


def _detector(name: str) -> tuple[nn.Module, tuple]:
    """A detector that finds something with random weights, and a few images with a box each."""
    settings: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    if name.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn")):
        settings |= {"box_score_thresh": 0.0, "box_detections_per_img": 4, "rpn_pre_nms_top_n_train": 20,
                     "rpn_post_nms_top_n_train": 10, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10,
                     "box_batch_size_per_image": 8}  # fmt: skip
    else:
        settings |= {"score_thresh": 0.0, "detections_per_img": 4, "topk_candidates": 8}
    if not name.startswith("ssd"):
        settings |= {"min_size": 64, "max_size": 96}
    if name.startswith("keypointrcnn"):
        settings |= {"num_classes": 2, "num_keypoints": 3}
    model = models.get_model(name, **settings)
    images = [torch.rand(3, 64, size) for size in (72, 64, 68, 80)[: _of(BATCHES, name, 4)]]
    targets = []
    for image in images:
        target: dict[str, Tensor] = {"boxes": torch.tensor([[8.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
        if name.startswith("maskrcnn"):
            target["masks"] = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
            target["masks"][0, 6:50, 8:40] = 1
        if name.startswith("keypointrcnn"):
            target["keypoints"] = torch.tensor([[[12.0, 10.0, 1.0], [20.0, 30.0, 1.0], [33.0, 41.0, 1.0]]])
        targets.append(target)
    if name.startswith("keypointrcnn"):
        return WithTargets(model, targets), (images,)
    return model, (images, targets)


class WithTargets(nn.Module):
    """A detector and its targets: some refuse targets in float64, in which inputs are differentiated."""

    def __init__(self, model: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, images: list[Tensor]) -> Any:
        return self.model(images, self.targets if self.training else None)
