"""Detection: lists of images and of dicts, proposals chosen by data, losses in train mode and boxes in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.optical_flow import raft
from torchvision.ops import MultiScaleRoIAlign

import fxstn
from fxstn import hp


def backbone():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.Tanh(), nn.Dropout(0.1), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()
    )
    net.out_channels = 4
    return net


ANCHORS = {"sizes": ((16, 32),), "aspect_ratios": ((0.5, 1.0),)}
SIZES = {"min_size": 48, "max_size": 64, "num_classes": None}
FEW = {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 4, "rpn_batch_size_per_image": 8,
       "box_batch_size_per_image": 8, "box_score_thresh": 0.0, "box_detections_per_img": 3}  # fmt: skip


def regions(size):
    return MultiScaleRoIAlign(["0"], size, 2)


def faster():
    head = detection.faster_rcnn.TwoMLPHead(4 * 9, 8)
    return detection.FasterRCNN(
        backbone(), rpn_anchor_generator=AnchorGenerator(**ANCHORS), box_roi_pool=regions(3), box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3), **SIZES, **FEW,
    )  # fmt: skip


def mask():
    return detection.MaskRCNN(
        backbone(), rpn_anchor_generator=AnchorGenerator(**ANCHORS), box_roi_pool=regions(3), mask_roi_pool=regions(4),
        box_head=detection.faster_rcnn.TwoMLPHead(4 * 9, 8), mask_head=detection.mask_rcnn.MaskRCNNHeads(4, (4,), 1),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(4, 4, 3), **SIZES, **FEW,
    )  # fmt: skip


def retina():
    settings = {"score_thresh": 0.0, "detections_per_img": 3, "topk_candidates": 5}
    return detection.RetinaNet(backbone(), **{**SIZES, "num_classes": 3}, **settings,
                               anchor_generator=AnchorGenerator(**ANCHORS))  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 48, 48 + 8 * i, generator=generator) for i in range(2)]
    corners = 24 * torch.rand(2, 2, 2, generator=generator)
    boxes = [torch.cat([corner, corner + 12], 1) for corner in corners]
    masks = [(torch.rand(2, *image.shape[1:], generator=generator) > 0.5).to(torch.uint8) for image in images]
    labels = torch.tensor([1, 2])
    return images, [{"boxes": b, "labels": labels, "masks": m} for b, m in zip(boxes, masks, strict=True)]


@pytest.mark.parametrize("make", [faster, mask, retina])
def test_the_tangent_of_a_detector_is_the_derivative_of_the_original(make):
    torch.manual_seed(0)
    report = fxstn.verify(make(), *batch(), hparams=[hp.Dropout()], trace="live", seeds=6)
    assert {check.mode for check in report.checks} == {"train", "eval"}
    assert report.ok, str(report)


def test_a_detector_trains_and_tunes():
    torch.manual_seed(0)
    inputs = batch()
    stn = fxstn.transform(faster(), example_inputs=inputs)
    assert (stn.frontend, stn.hparams.names) == ("live", ("backbone.2.dropout",))
    losses = lambda output, target: sum(output.values())  # noqa: E731
    optimizer = torch.optim.SGD([*stn.general_parameters(), *stn.response_parameters()], lr=0.05)
    history = []
    for _ in range(10):
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = fxstn.general_loss(stn.train(), losses, inputs, None)
        (loss + fxstn.response_loss(stn, losses, inputs, None)).backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0]
    scores = lambda output, target: sum(o["scores"].square().sum() for o in output)  # noqa: E731
    fxstn.hyper_loss(stn.eval(), scores, inputs, None).backward()
    assert stn.hparams.unconstrained.grad.abs().sum() > 0


class Flow(raft.RAFT):
    """Tiny RAFT (Teed & Deng 2020): a recurrence whose positions are detached in each step, with a list of outputs."""

    def __init__(self):
        super().__init__(
            feature_encoder=nn.Conv2d(3, 4, 8, stride=8),
            context_encoder=nn.Conv2d(3, 8, 8, stride=8),
            corr_block=raft.CorrBlock(num_levels=2, radius=1),
            update_block=raft.UpdateBlock(
                motion_encoder=raft.MotionEncoder(
                    in_channels_corr=18, corr_layers=(4,), flow_layers=(4, 4), out_channels=6
                ),
                recurrent_block=raft.RecurrentBlock(input_size=10, hidden_size=4, kernel_size=(3,), padding=(1,)),
                flow_head=raft.FlowHead(in_channels=4, hidden_size=4),
            ),
            mask_predictor=raft.MaskPredictor(in_channels=4, hidden_size=4),
        )

    def forward(self, first, second):
        return super().forward(first, second, num_flow_updates=2)


def test_the_tangent_of_optical_flow_is_the_derivative_of_the_original():
    torch.manual_seed(0)
    frames = (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))
    report = fxstn.verify(Flow(), *frames, hparams=[hp.Scalar("a", 0.5, 0, 1)], trace="live", seeds=6)
    assert report.ok, str(report)
