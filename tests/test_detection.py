"""Detection: lists of images and of dicts, proposals chosen by data, losses in train mode and boxes in eval mode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.optical_flow import raft
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.bilevel import losses
from fxstn.bilevel.batches import first_part, parts_of
from fxstn.frontends.inputs import as_inputs
from fxstn.ir.input_errors import explanation
from fxstn.ops.batch_axis import batch_size


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


def fcos():
    trunk = nn.Sequential(*backbone(), nn.Conv2d(4, 32, 1))  # its heads have norms of 32 groups
    trunk.out_channels = 32
    settings = {"score_thresh": 0.0, "detections_per_img": 3, "topk_candidates": 5}
    return detection.FCOS(trunk, **{**SIZES, "num_classes": 3}, **settings,
                          anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))  # fmt: skip


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = backbone()

    def forward(self, x):
        return {"0": self.body(x)}


def ssd():
    boxes, head = DefaultBoxGenerator([[2]], scales=[0.2, 0.4]), detection.ssd.SSDHead([4], [4], 3)
    settings = {"score_thresh": 0.0, "detections_per_img": 3, "topk_candidates": 5}
    return detection.ssd.SSD(Maps(), boxes, (48, 48), 3, head=head, **settings)


def keypoint():
    return detection.KeypointRCNN(
        backbone(), rpn_anchor_generator=AnchorGenerator(**ANCHORS), box_roi_pool=regions(3), keypoint_roi_pool=regions(4),
        box_head=detection.faster_rcnn.TwoMLPHead(4 * 9, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3),
        keypoint_head=detection.keypoint_rcnn.KeypointRCNNHeads(4, (4,)),
        keypoint_predictor=detection.keypoint_rcnn.KeypointRCNNPredictor(4, 2), **SIZES, **FEW,
    )  # fmt: skip


def with_losses(make, *augmentations):
    result = lambda: fxstn.DetectionLosses(make(), *augmentations)  # noqa: E731
    result.__name__ = f"losses of {make.__name__}"
    return result


def batch():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 48, 48 + 8 * i, generator=generator) for i in range(2)]
    corners = 24 * torch.rand(2, 2, 2, generator=generator)
    boxes = [torch.cat([corner, corner + 12], 1) for corner in corners]
    masks = [(torch.rand(2, *image.shape[1:], generator=generator) > 0.5).to(torch.uint8) for image in images]
    labels = torch.tensor([1, 2])
    points = [
        torch.cat(
            [
                b[:, None, :2] + 4,
                b[:, None, 2:] - 4,
            ],
            1,
        )
        for b in boxes
    ]
    points = [torch.cat([p, torch.ones(2, 2, 1)], 2) for p in points]
    entries = zip(boxes, masks, points, strict=True)
    return images, [{"boxes": b, "labels": labels, "masks": m, "keypoints": p} for b, m, p in entries]


class Pairs(torch.utils.data.Dataset):
    """Images of two sizes, each with a dict."""

    def __init__(self, count):
        self.examples = [tuple(part[i % 2] for part in batch()) for i in range(count)]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def loader(count, size):
    return DataLoader(Pairs(count), size, collate_fn=lambda examples: tuple(zip(*examples, strict=True)))


@pytest.mark.parametrize("make", [mask, with_losses(faster), with_losses(retina, v2.RandomAffine(10, (0.1, 0.1)))])
def test_the_tangent_of_a_detector_is_the_derivative_of_the_original(make):
    torch.manual_seed(0)
    report = fxstn.verify(make(), *batch(), hparams=[hp.Dropout()], trace="live", seeds=6)
    assert {check.mode for check in report.checks} == {"train", "eval"}
    assert report.ok, str(report)


@pytest.mark.parametrize("make", [faster, mask, keypoint, retina, fcos, ssd])
def test_losses_in_eval_mode_are_those_of_train_mode_without_dropout_and_with_the_same_draws(make):
    torch.manual_seed(0)
    model, (images, targets) = fxstn.DetectionLosses(make()), batch()
    with torch.no_grad():
        for parameter in model.parameters():  # heads begin near 0
            parameter.normal_(std=0.3)
        state = torch.get_rng_state()
        losses = model.eval()(images, targets)
        assert torch.equal(state, torch.get_rng_state())
        assert not any(module.training for module in model.modules())
        boxes, plain = model(images)[0]["boxes"], model.detector(images)[0]["boxes"]
        assert torch.equal(boxes, plain)
        assert torch.equal(fxstn.detection_loss(losses), fxstn.detection_loss(model(images, targets)))
        assert not torch.equal(fxstn.detection_loss(losses), fxstn.detection_loss(model.train()(images, targets)))
        for module in model.modules():  # of one size, drawn in train mode
            if isinstance(module, (nn.Dropout, GeneralizedRCNNTransform)):
                module.eval()
        torch.manual_seed(0)
        expected = model.detector(images, targets)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")  # images are written into a batch
def test_a_detector_trains_and_tunes_on_images_and_dicts():
    torch.manual_seed(0)
    model, (images, targets) = fxstn.DetectionLosses(faster()), batch()
    stn = fxstn.transform(model, [hp.Dropout(init=0.5)], example_inputs=(images, targets))
    assert (stn.frontend, stn.hparams.names) == ("live", ("detector.backbone.2.dropout",))
    hyper = fxstn.HyperSettings(optimizer=partial(torch.optim.Adam, lr=0.1), train_steps=1, warmup_epochs=0)
    runner = fxstn.BilevelRunner(stn, fxstn.detection_loss, loader(5, 2), loader(3, 2), hyper=hyper,
                                 optimizer=partial(torch.optim.SGD, lr=0.05))  # fmt: skip
    history = runner.fit(2)
    assert history.rows[-1]["detector.backbone.2.dropout"] != pytest.approx(0.5, abs=1e-3)
    assert runner.best_model().detector.eval()(images)[0].keys() == {"boxes", "labels", "scores"}
    loss = losses.general_loss(stn.train(), fxstn.detection_loss, (images, targets), targets)
    assert (loss.count, loss.entries) == (2, 2)  # images, not anchors


@pytest.mark.filterwarnings("ignore:one ε for the whole batch")  # images are written into a batch
def test_a_detector_is_tuned_in_the_loop_that_there_is():
    torch.manual_seed(0)
    model, train = fxstn.DetectionLosses(retina()), loader(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hyper = fxstn.HyperSettings(optimizer=partial(torch.optim.Adam, lr=0.1), train_steps=1, warmup_epochs=0)
    specs = [hp.Dropout(init=0.5)]
    tuner = fxstn.tune(model, optimizer, fxstn.detection_loss, train, loader(3, 2), specs, hyper=hyper)
    for _ in range(2):
        for images, targets in train:
            optimizer.zero_grad()
            fxstn.detection_loss(model.train()(images, targets)).backward()
            optimizer.step()
    assert len(tuner.history) == 2
    assert tuner.values()["detector.backbone.2.dropout"] != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("widths", [(48, 48), (48, 56)])
def test_augmentations_of_a_detector_move_boxes_and_masks_with_each_image(widths, monkeypatch):
    torch.manual_seed(0)
    model = fxstn.DetectionLosses(faster(), v2.RandomAffine(0, (0.2, 0.2), (0.7, 1.3)), v2.RandomHorizontalFlip())
    images, targets, seen = [torch.zeros(3, 48, width) for width in widths], [], []
    for image in images:
        image[:, 14:30, 10:22] = 1
        targets.append({"boxes": torch.tensor([[10.0, 14.0, 22.0, 30.0]]), "masks": image[:1].to(torch.uint8)})
    monkeypatch.setattr(model.detector, "forward", lambda *args: seen.append(args))
    for _ in range(4):
        model.train()(images, targets)
    boxes = []
    for moved, targets in seen:
        for image, target in zip(moved, targets, strict=True):
            columns, rows = ((image[0] > 0.5).any(axis).nonzero()[:, 0] for axis in (0, 1))
            around = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            assert (target["boxes"][0] - around).abs().max() < 1
            assert (target["masks"][0] == (image[0] > 0.5)).float().mean() > 0.98
            boxes.append(target["boxes"][0])
    assert torch.stack(boxes).std(0).min() > 1  # each image had a draw of its own


def test_a_followed_detector_augments_as_the_plain_one_does():
    torch.manual_seed(0)
    model = fxstn.DetectionLosses(retina(), v2.RandomAffine(10, (0.1, 0.1)), v2.RandomHorizontalFlip())
    model.detector.backbone[2] = nn.Identity()  # a dropout
    for parameter in model.parameters():  # heads begin near 0
        parameter.data.normal_(std=0.3)
    inputs = batch()
    stn = fxstn.transform(model, [hp.Scalar("a", 0.5, 0, 1)], example_inputs=inputs, trace="live")
    runs = (lambda: fxstn.detection_loss(model.train()(*inputs)),
            lambda: fxstn.general_loss(stn.train(), fxstn.detection_loss, inputs, inputs[1]))  # fmt: skip
    values = []
    for run in (*runs, runs[0]):
        torch.manual_seed(3 if len(values) < 2 else 4)
        values.append(run().item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(values[2], rel=1e-5)


def test_batches_that_list_their_examples_are_counted_and_cut_by_them():
    images, targets = batch()
    inputs = fxstn.DetectionLosses.unpack_batch((tuple(images), tuple(targets)))
    for value in (inputs, inputs[0], as_inputs(inputs[0], nn.Identity()), (tuple(images), tuple(targets))):
        assert batch_size(value) == 2
    assert batch_size((torch.ones(5, 3), {"a": torch.ones(4)})) == 5
    (images, first), target = first_part((inputs[0], inputs[1]), 0.5)
    assert len(images) == len(first) == len(target) == 1
    assert images[0] is inputs[0][0][0]
    assert target[0] is first[0] is targets[0]
    assert [len(part[1]) for part in parts_of((tuple(inputs[0][0]), tuple(targets)), 1)] == [1, 1]


def test_what_is_no_detector_no_losses_and_no_batch_of_a_detector_is_refused():
    with pytest.raises(TypeError, match=r"takes a detector of .*, got Linear"):
        fxstn.DetectionLosses(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got a list: a detector returns boxes .* fxstn.DetectionLosses\(detector\)"):
        fxstn.detection_loss([{"boxes": torch.ones(1, 4)}])
    text = explanation(IndexError("too many indices"), batch()[0], retina())
    assert text.endswith("a list of targets: give transform, or tune, fxstn.DetectionLosses(detector)")
    with pytest.raises(ValueError, match=r"a detector's batch is .* collate_fn="):
        fxstn.DetectionLosses.unpack_batch((torch.ones(2, 3, 8, 8), torch.ones(2)))


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
