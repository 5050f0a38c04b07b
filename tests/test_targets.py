"""Targets that move along with their images: masks, boxes, keypoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as f

import fxstn
from fxstn import hp
from fxstn.bilevel import losses
from fxstn.hp.moving import recorded_moves
from fxstn.hp.targets import move_target
from fxstn.loops.forwards import default_forward, loss_of

SIZE = (24, 36)


def drawn(kind, x, *strengths, **settings):
    """(moved images, the moves)."""
    with recorded_moves() as moves:
        return kind.function(x, *strengths, **{**kind.defaults, **settings}), moves


def boxes_of(count, form="XYXY"):
    corner = torch.rand(count, 2) * torch.tensor([SIZE[1] / 2, SIZE[0] / 2])
    boxes = tv_tensors.BoundingBoxes(torch.cat([corner, corner + 8], 1), format="XYXY", canvas_size=SIZE)
    return f.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat[form])


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
@pytest.mark.parametrize("kind", [hp.Flip, hp.VerticalFlip, hp.Affine, hp.Rotation])
def test_masks_and_boxes_of_each_example_move_as_torchvision_moves_them(kind, form, monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(5, 3, *SIZE)
    masks = torch.randint(0, 7, (5, *SIZE))
    boxes = [boxes_of(3, form) for _ in range(5)]
    parameters = []
    if kind in (hp.Affine, hp.Rotation):
        from fxstn.hp import geometry

        original = geometry.inverse_affine
        monkeypatch.setattr(geometry, "inverse_affine", lambda *args: parameters.append(args) or original(*args))
    strengths = {"Flip": (0.5,), "VerticalFlip": (0.5,), "Affine": (40.0, 0.2, 0.3, 20.0), "Rotation": (90.0,)}
    _, moves = drawn(kind, x, *strengths[kind.__name__])
    (moved_masks, moved_boxes), kinds = move_target((masks, boxes), moves)
    assert kinds == {"masks", "boxes"}
    assert moved_boxes[0].format == boxes[0].format
    for i in range(5):
        if parameters:
            angle, translate, scale, shear, _ = parameters[0]
            arguments = (angle[i].item(), translate[i].tolist(), scale[i].item(), shear[i].tolist())
            there = lambda value, a=arguments: f.affine(value, *a)  # noqa: E731
        else:
            function = f.horizontal_flip if kind is hp.Flip else f.vertical_flip
            there = function if moves[0].drawn[i] else lambda value: value
        expected = there(tv_tensors.Mask(masks[i]))
        assert (moved_masks[i] == expected).float().mean() > 0.99  # a pixel between two may go to either
        expected = f.clamp_bounding_boxes(there(boxes[i]))
        torch.testing.assert_close(
            *(b.as_subclass(torch.Tensor) for b in (moved_boxes[i], expected)), rtol=0, atol=1e-3
        )


def entry(size=SIZE):
    """What a detector is told of one image: of an object in the left half, and of one in the right half."""
    height, width = size
    left, right = [2.0, 3.0, width / 2 - 4, height - 3], [width / 2 + 5, 4.0, width - 1, height - 2]
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, :, : width // 2], masks[1, :, width // 2 :] = 1, 1
    points = torch.tensor([[[3.0, 5.0, 1.0]], [[width - 2.0, 6.0, 1.0]]])
    return {"boxes": torch.tensor([left, right]), "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": points,
            "image_id": 7}  # fmt: skip


def test_all_that_a_dict_says_of_an_image_moves_and_objects_that_leave_it_are_dropped():
    x = torch.rand(3, 3, *SIZE)
    _, moves = drawn(hp.Affine, x, 0.0, 0.5, 0.0, 0.0)
    shift = torch.tensor([[0.0, 0.0], [-18.0, 0.0], [0.0, 9.0]])  # of the images, in pixels
    moves[0].drawn.copy_(torch.cat([torch.eye(2).expand(3, 2, 2), -shift[:, :, None]], 2))
    original = [entry() for _ in range(3)]
    moved, kinds = move_target(original, moves)
    assert kinds == {"boxes", "masks", "keypoints"}
    for name, value in original[0].items():
        assert torch.equal(torch.as_tensor(moved[0][name]), torch.as_tensor(value))
    gone = moved[1]
    assert (gone["labels"].tolist(), gone["image_id"]) == ([2], 7)
    torch.testing.assert_close(gone["boxes"], original[1]["boxes"][1:] - torch.tensor([18.0, 0, 18, 0]))
    assert torch.equal(gone["masks"][0, :, :18], torch.ones(24, 18, dtype=torch.uint8))
    assert not gone["masks"][0, :, 18:].any()
    torch.testing.assert_close(gone["keypoints"], torch.tensor([[[16.0, 6.0, 1.0]]]))
    assert moved[2]["boxes"][:, 3].tolist() == [24, 24]  # cut at the border
    assert moved[2]["keypoints"][:, 0, 1].tolist() == [14, 15]
    outside = move_target([{"keypoints": torch.tensor([[[3.0, 23.0, 1.0]]])}] * 3, moves)[0][2]["keypoints"]
    assert outside.flatten().tolist() == [3, 32, 0]


def test_a_mask_of_another_size_than_the_images_moves_by_the_same_share():
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(2, 1, 2, 3), SIZE, mode="bicubic")
    small = tv_tensors.Mask((x > 0).long()[:, 0])
    large = tv_tensors.Mask(small.repeat_interleave(2, 1).repeat_interleave(3, 2))
    for kind, strengths in {hp.Affine: (30.0, 0.2, 0.2, 10.0), hp.VerticalFlip: (0.6,)}.items():
        _, moves = drawn(kind, x, *strengths)
        one, other = (move_target(value, moves)[0] for value in (small, large))
        shrunk = F.interpolate(other[:, None].float(), SIZE, mode="area")[:, 0]
        assert ((shrunk - one).abs() < 0.5).float().mean() > 0.98


class Segmenter(nn.Module):
    """A network with an output and an auxiliary one, as torchvision's segmentation models."""

    def __init__(self, *first):
        super().__init__()
        self.augment = nn.Sequential(*first)
        self.body, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.2)
        self.head, self.side = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.drop(torch.tanh(self.body(self.augment(x))))
        return {"out": self.head(x), "aux": self.side(x)}


def per_pixel(output, target):
    main, side = (F.cross_entropy(output[name], target, ignore_index=255) for name in ("out", "aux"))
    return main + 0.5 * side


WITH_MASKS = v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), fill={tv_tensors.Image: 0.3, tv_tensors.Mask: 255})


@pytest.mark.parametrize(
    ("method", "trace", "first", "hparams"),
    [
        ("delta", "fx", (), [hp.Affine("input", target_fill=255), hp.Flip(), hp.Dropout("drop")]),
        ("stn", "fx", (WITH_MASKS, v2.RandomHorizontalFlip()), None),
        (
            "delta",
            "export",
            (WITH_MASKS, v2.RandomHorizontalFlip()),
            [hp.Dropout("drop")],
        ),  # augmentations that are not tuned
        ("centered", "live", (WITH_MASKS, v2.RandomHorizontalFlip()), None),
    ],
)
def test_masks_move_with_the_images_of_a_segmentation_network(method, trace, first, hparams):
    torch.manual_seed(0)
    x, masks = torch.rand(4, 3, 16, 16), torch.randint(0, 3, (4, 16, 16))
    stn = fxstn.transform(Segmenter(*first), hparams, method=method, trace=trace, example_inputs=x).train()
    seen = []
    loss_fn = lambda output, target: seen.append((output, target)) or per_pixel(output, target)  # noqa: E731
    epsilon = torch.randn(len(stn.hparams)) / 4
    for objective in (losses.general_loss, losses.response_loss):
        torch.manual_seed(3)
        objective(stn, loss_fn, x, masks, perturb=epsilon).total().backward()
        torch.manual_seed(3)
        with recorded_moves() as moves:
            stn.perturbed_output(
                x, delta=epsilon, condition=epsilon if method == "stn" or len(seen) > 1 else 0 * epsilon
            )
        assert [move.operation for move in moves] == [hp.Affine, hp.Flip]
        target = seen[-1][1]
        assert torch.equal(target, move_target(masks, moves)[0])
        assert 255 in target
        assert not torch.equal(target, masks)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stn.response_parameters())
    seen.clear()
    losses.hyper_loss(stn.eval(), loss_fn, x, masks).total()
    losses.validation_loss(stn, loss_fn, x, masks)
    assert all(target is masks for _, target in seen)


def test_maps_of_numbers_stay_with_a_warning_unless_a_type_says_that_they_are_images():
    x, net = torch.rand(4, 3, 16, 16), nn.Conv2d(3, 3, 1)
    stn = fxstn.transform(net, [hp.Flip(init=0.9999)]).train()
    fxstn.general_loss(stn, lambda output, target: F.mse_loss(output.mean((2, 3)), target), x, torch.rand(4, 3))
    targets = []
    loss_fn = lambda output, target: targets.append(target) or F.mse_loss(output, target)  # noqa: E731
    with pytest.warns(UserWarning, match=r"hp\.Flip moves the images and not the target, .*tv_tensors\.Image"):
        fxstn.general_loss(stn, loss_fn, x, x)
    torch.manual_seed(0)
    fxstn.general_loss(stn, loss_fn, x, tv_tensors.Image(x))
    assert targets[0] is x
    assert torch.equal(targets[1].as_subclass(torch.Tensor), x.flip(-1))


def test_a_loop_of_ones_own_does_not_move_masks_and_so_refuses_to_move_the_images():
    net, batch = Segmenter(v2.RandomHorizontalFlip()), (torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)))
    loss_fn = loss_of(default_forward, net, per_pixel)
    stn = fxstn.transform(net)
    assert fxstn.hyper_loss(stn.eval(), loss_fn, batch[0], batch).isfinite()
    with pytest.raises(ValueError, match=r"hp\.Flip moves the images, and the target has masks, .* BilevelRunner"):
        fxstn.response_loss(stn.train(), loss_fn, batch[0], batch)
    own = loss_of(default_forward, net, lambda output, target: output["out"].mean((2, 3)).sum() + target.sum())
    assert fxstn.response_loss(stn, own, batch[0], (batch[0], torch.ones(2))).isfinite()


def test_cutmix_puts_the_box_into_a_map_of_classes_too():
    x, target = torch.rand(4, 1, 8, 8), torch.randint(0, 9, (4, 8, 8))
    box, partner, share = hp.CutMix.draw(x, 2.0)
    moved = hp.CutMix().retarget(target, torch.rand(4, 9, 8, 8), (box, partner, share))
    assert box.any()
    assert torch.equal(moved, hp.CutMix.apply(target[:, None], (box, partner, share))[:, 0])


def test_boxes_in_a_format_with_an_angle_are_refused():
    boxes = tv_tensors.BoundingBoxes(torch.rand(1, 5), format="CXCYWHR", canvas_size=SIZE)
    _, moves = drawn(hp.Flip, torch.rand(1, 3, *SIZE), 1.0)
    with pytest.raises(ValueError, match="CXCYWHR cannot move along"):
        move_target([{"boxes": boxes}], moves)
