"""Detectors of torchvision, which return losses in train mode and boxes in eval mode: the losses in both modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from fxstn.frontends.decompositions.torchvision import random_modules
from fxstn.hp.moving import recorded_moves
from fxstn.hp.targets import move_target

Targets = Sequence[Mapping[str, Tensor]]
# Modules that compute losses where their `training` is set. They have no weights of their own and no other use of it.
_SWITCHES = (GeneralizedRCNN, RegionProposalNetwork, RoIHeads, RetinaNet, FCOS, SSD)


class DetectionLosses(nn.Module):
    """A detector of torchvision whose losses can be had in both modes: forward(images, targets) → {name: loss}.

    With targets it returns the losses. In eval mode they are those of the network as it will be used: norms, dropout and the
    resizing of images as in eval mode, and every call draws the same samples of anchors and proposals. Without targets, in
    eval mode, it returns boxes as the detector does.

    detector: has one of torchvision's detectors (Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD) in it.
    augmentations: modules of `torchvision.transforms.v2`, or others that an `hp.Operation` takes over. In train mode they act
        on the images, each with a draw of its own, and move boxes, masks and keypoints along (`fxstn.hp.Moving`).

    The runner and `fxstn.tune` take batches (images, targets) of it. `detector` is also the attribute with the trained weights.

    Raises TypeError where there is no such detector.
    """

    def __init__(self, detector: nn.Module, *augmentations: nn.Module) -> None:
        super().__init__()
        if not any(isinstance(module, _SWITCHES) for module in detector.modules()):
            raise TypeError(f"DetectionLosses takes a detector of torchvision.models.detection, got {type(detector).__name__}; "
                            "a model that returns its losses in both modes needs no wrapper")  # fmt: skip
        self.detector, self.augment = detector, nn.Sequential(*augmentations)

    def forward(self, images: Sequence[Tensor], targets: Targets | None = None) -> Any:
        if targets is None:
            return self.detector(list(images))
        if self.training:
            return self.detector(*self._augmented(list(images), list(targets)))
        with self._switched_to_losses(), _same_draws(images[0].device):
            return self.detector(list(images), targets)

    def _augmented(self, images: list[Tensor], targets: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """Images and targets after the augmentations; images of one size all at once."""
        if not len(self.augment):
            return images, targets
        if len({image.shape for image in images}) > 1:
            pairs = [self._augmented([image], [target]) for image, target in zip(images, targets, strict=True)]
            return [image for (image,), _ in pairs], [target for _, (target,) in pairs]
        with random_modules(self.augment.modules()), recorded_moves() as moves:
            batch = self.augment(torch.stack(images))
        return list(batch), move_target(targets, moves)[0]

    @contextmanager
    def _switched_to_losses(self) -> Iterator[None]:
        switches = [module for module in self.detector.modules() if isinstance(module, _SWITCHES)]
        before = [module.training for module in switches]
        try:
            for module in switches:
                module.training = True
            yield
        finally:
            for module, training in zip(switches, before, strict=True):
                module.training = training

    @staticmethod
    def unpack_batch(batch: Any) -> tuple[tuple[list[Tensor], list[Mapping[str, Tensor]]], list[Mapping[str, Tensor]]]:
        """((images, targets), targets) of a batch (images, targets): the forward takes both.

        Raises ValueError for another batch.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or isinstance(batch[1], (Tensor, Mapping)):
            raise ValueError(
                f"a detector's batch is (images, targets), with a dict for each image, got a {type(batch).__name__}; give the "
                "DataLoader collate_fn=lambda examples: tuple(zip(*examples))"
            )
        images, targets = map(list, batch)
        return (images, targets), targets


def detection_loss(output: Mapping[str, Tensor], target: Targets | None = None) -> Tensor:
    """The sum of a detector's losses, as torchvision's references train it.

    output: of `fxstn.DetectionLosses`, {name: loss}.
    target: says only how many images the sum counts for; the forward has computed the losses.

    Returns a scalar, a mean over the images. Raises TypeError for boxes, which have no loss.
    """
    if not isinstance(output, Mapping):
        raise TypeError(
            f"detection_loss sums losses, {{name: loss}}, and got a {type(output).__name__}: a detector returns boxes in eval "
            "mode; give transform, or tune, fxstn.DetectionLosses(detector)"
        )
    total = torch.stack(list(output.values())).sum()
    return total if target is None else total.expand(len(target)).mean()  # `as_loss` reads off what it is a mean over


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Inside, every call draws the same random numbers; afterwards the generators go on as if nothing was drawn."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        torch.default_generator.manual_seed(0)
        if others:
            torch.get_device_module(device).manual_seed(0)
        yield
