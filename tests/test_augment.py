"""Augmentations and regularisers as conditioned operations: equal to torchvision's, one example at a time."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

import fxstn
from fxstn import hp
from fxstn.hp.augment import spread
from fxstn.ir.staging import draws
from fxstn.ops.color import jitter
from fxstn.ops.erase import boxes_mask, cutout_mask, erasing_mask
from fxstn.ops.geometry import inverse_affine, resample
from fxstn.ops.noise import by_example, weight_mask
from fxstn.tools.cli import main
from fxstn.tools.show import strengths_of

AUGMENTATIONS = [hp.ColorJitter, hp.Affine, hp.Rotation, hp.Cutout, hp.Erasing, hp.Flip, hp.VerticalFlip, hp.Grayscale,
                 hp.GaussianNoise, hp.GaussianBlur, hp.MixUp, hp.CutMix]  # fmt: skip
MODULES = {
    v2.ColorJitter(0.3, 0.4, 0.5, 0.1): [0.3, 0.4, 0.5, 0.1],
    v2.RandomAffine(10, (0.1, 0.2), (0.9, 1.1), 5): [10, 0.2, 0.1, 5],
    v2.RandomRotation(20): [20],
    v2.RandomErasing(0.3): [0.3],
    v2.RandomHorizontalFlip(0.4): [0.4],
    v2.RandomVerticalFlip(0.4): [0.4],
    v2.RandomGrayscale(0.2): [0.2],
    v2.GaussianNoise(sigma=0.2): [0.2],
    v2.GaussianBlur(3, (0.1, 1.5)): [1.5],
    torchvision.ops.StochasticDepth(0.3, "row"): [0.3],
}


def images(batch: int = 6, size: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.rand(batch, 3, size, size + 2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    x[0] = x[0].mean(0)  # grey, without hue
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def classifier(*before: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *before, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 9, 5)
    )


# Equal to torchvision, example by example


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.uint8, 5)])
def test_colour_equals_torchvision_in_every_order(dtype, tolerance):
    """torchvision turns the hue in float32, and cuts uint8 off to whole levels after each of four steps."""
    x = images(24, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    factors = 2 * torch.rand(24, 3, generator=generator)
    shift = torch.rand(24, generator=generator) - 0.5
    order = torch.rand(24, 3, generator=generator).argsort(1)
    arrangement = torch.randperm(24, generator=generator)
    found = jitter(
        x, *(v.to(dtype if x.is_floating_point() else torch.float32) for v in (factors, shift)), order, arrangement
    )
    names = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation]
    for place, i in enumerate(arrangement.tolist()):
        steps = [(names[k], factors[i, k].item()) for k in order[i].tolist()]
        steps.insert(place // 6, (vision.adjust_hue, shift[i].item()))  # quarters of the batch
        expected = x[i]
        for step, strength in steps:
            expected = step(expected, strength)
        assert (found[i].double() - expected.double()).abs().max() <= tolerance


def test_a_mode_may_be_a_member_of_torchvisions():
    assert hp.Affine(mode=v2.InterpolationMode.NEAREST).settings == hp.Affine(mode="nearest").settings
    with pytest.raises(ValueError, match=r"mode='bicubic' must be one of"):
        hp.Affine(mode=v2.InterpolationMode.BICUBIC)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, (0.0,), (0.3, 0.6, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_affine_maps_equal_torchvision(mode, fill, dtype):
    x = images(8, dtype=dtype)
    fill = tuple(round(255 * value) for value in fill) if fill and dtype == torch.uint8 else fill
    generator = torch.Generator().manual_seed(2)
    angle, scale = 90 * torch.rand(8, generator=generator) - 45, 0.6 + torch.rand(8, generator=generator)
    shear = 60 * torch.rand(8, 2, generator=generator) - 30
    translate = torch.randint(-3, 4, (8, 2), generator=generator).float()
    center = (2.5, 6.0)
    from_middle = (center[0] - x.shape[-1] / 2, center[1] - x.shape[-2] / 2)
    found = resample(x, inverse_affine(angle, translate, scale, shear, from_middle), mode=mode, fill=fill)
    for i in range(8):
        expected = vision.affine(
            x[i], angle[i].item(), translate[i].tolist(), scale[i].item(), shear[i].tolist(),
            interpolation=v2.InterpolationMode(mode), fill=fill and list(fill), center=list(center),
        )  # fmt: skip
        assert (found[i].float() - expected.float()).abs().max() <= (1 if dtype == torch.uint8 else 1e-5)


def test_rotation_turns_as_torchvision_does():
    x = images(5)
    torch.manual_seed(3)
    matrices = hp.Rotation.draw(x, torch.full((5,), 30.0), **hp.Rotation.defaults)
    torch.manual_seed(3)
    angles = 30 * (2 * torch.rand(5, 1, 1, 1) - 1).flatten()
    found = hp.Rotation.apply(x, matrices, **hp.Rotation.defaults)
    for i in range(5):
        expected = vision.rotate(x[i], angles[i].item(), interpolation=v2.InterpolationMode.BILINEAR)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-5)


def test_erased_boxes_equal_torchvision():
    x = images(4)
    top, left, height, width = (
        torch.tensor(v)[:, None] for v in ([0, 2, 5, 3], [1, 0, 8, 2], [3, 4, 9, 0], [2, 5, 9, 4])
    )
    mask = boxes_mask(top, left, height, width, (9, 11))
    for i in range(4):
        expected = vision.erase(x[i], *(int(v[i]) for v in (top, left, height, width)), torch.zeros(3, 1, 1))
        torch.testing.assert_close(x[i].masked_fill(mask[i], 0), expected, rtol=0, atol=0)


def test_blur_equals_torchvision():
    x = images(4)
    torch.manual_seed(0)
    kernels = hp.GaussianBlur.draw(x, torch.tensor([0.3, 0.8, 1.5, 3.0]), kernel_size=(5, 3), shares=(1.0, 1.0))
    found = hp.GaussianBlur.apply(x, kernels, kernel_size=(5, 3), shares=(1.0, 1.0))
    for i, sigma in enumerate([0.3, 0.8, 1.5, 3.0]):
        torch.testing.assert_close(found[i], vision.gaussian_blur(x[i], [5, 3], [sigma, sigma]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_flips_and_grey_equal_torchvision(dtype):
    x, chosen = images(4, dtype=dtype), torch.tensor([True, False, True, False]).view(-1, 1, 1, 1)
    for spec, expected in (
        (hp.Flip, vision.horizontal_flip(x)),
        (hp.VerticalFlip, vision.vertical_flip(x)),
        (hp.Grayscale, vision.rgb_to_grayscale(x, 3)),
    ):
        found = spec.apply(x, chosen)
        assert torch.equal(found[1::2], x[1::2])
        assert (found[::2].float() - expected[::2].float()).abs().max() <= (1 if dtype == torch.uint8 else 1e-6)


# Draws


def kolmogorov_smirnov(sample: torch.Tensor, low: float, high: float) -> float:
    """Distance of a sample from the uniform distribution, times √n: above 1.95 in one of 1,000 samples."""
    n = len(sample)
    share = ((sample.double().sort().values - low) / (high - low)).clamp(0, 1)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((share - steps[:-1]).max(), (steps[1:] - share).max()).item()


def test_draws_are_uniform_up_to_the_strength_of_each_example():
    x = torch.zeros(8000, 3, 2, 2)
    torch.manual_seed(1)
    weak_and_strong = torch.tensor([0.1, 0.5]).repeat(4000)
    factors, shift, order, arrangement = hp.ColorJitter.draw(x, *[weak_and_strong] * 4, **hp.ColorJitter.defaults)
    for k, values in enumerate((*factors.T, shift)):
        middle = float(k < 3)
        assert kolmogorov_smirnov(values[::2], middle - 0.1, middle + 0.1) < 1.95
        assert kolmogorov_smirnov(values[1::2], middle - 0.5, middle + 0.5) < 1.95
    codes = order @ torch.tensor([9, 3, 1])
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 8000 / 6).abs().max() < 4 * math.sqrt(8000 * 5 / 36)
    assert torch.equal(arrangement.sort().values, torch.arange(8000))


@pytest.mark.parametrize("spec", AUGMENTATIONS)
def test_every_setting_of_an_operation_can_be_given(spec):
    """No setting has the name of a keyword of every spec, such as scale, which would take its value."""
    assert spec("", **spec.defaults).settings == spec.defaults


def test_ranges_that_are_not_symmetric_are_kept():
    assert spread((0.8, 1.4), 1) == (pytest.approx(0.4), (pytest.approx(-0.5), 1.0))
    assert spread((-10.0, 30.0), 0) == (30.0, (pytest.approx(-1 / 3), 1.0))
    assert spread(None, 1) == (0.0, (-1.0, 1.0))
    x = torch.zeros(4000, 3, 8, 8)
    torch.manual_seed(0)
    starts, settings = hp.Rotation.read(v2.RandomRotation((-10, 30)))
    matrices = hp.Rotation.draw(x, starts["rotation"], **settings)
    angles = torch.rad2deg(torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert kolmogorov_smirnov(-angles, -10, 30) < 1.95


def test_cutout_has_so_many_holes_of_such_a_length():
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 16, 16)
    one = cutout_mask(x, by_example(1.0, x), by_example(4.0, x), 5)
    rows = one.any(-1).sum((1, 2))
    inside = torch.tensor(
        [2, 3] + [4] * 13 + [3]
    ).float()  # a square that starts 2 before its pixel is cut at both ends
    assert rows.float().mean().item() == pytest.approx(
        inside.mean().item(), abs=4 * inside.std().item() / math.sqrt(4000)
    )
    assert cutout_mask(x, by_example(0.0, x), by_example(4.0, x), 5).sum() == 0
    assert cutout_mask(x, by_example(3.0, x), by_example(2.0, x), 5).sum((1, 2, 3)).max() <= 12
    by_rows = cutout_mask(x[:2], by_example(torch.tensor([0.0, 4.0]), x[:2]), by_example(8.0, x), 5)
    assert not by_rows[0].any()
    assert by_rows[1].any()


def test_erasing_has_the_rate_and_the_area_of_torchvision():
    torch.manual_seed(0)
    x = torch.zeros(2000, 1, 20, 20)
    mask = erasing_mask(x, by_example(torch.tensor([0.2, 0.7]).repeat(1000), x), (0.02, 0.33), (0.3, 3.3))
    rate = mask.flatten(1).any(1).float()
    assert rate[::2].mean().item() == pytest.approx(0.2, abs=0.05)
    assert rate[1::2].mean().item() == pytest.approx(0.7, abs=0.06)
    reference = torch.stack([v2.RandomErasing(1.0, value=1.0)(x[0]) for _ in range(1000)]).flatten(1).mean(1)
    area = mask[rate.bool()].flatten(1).float().mean(1)
    spread_of_mean = math.hypot(area.std().item() / math.sqrt(len(area)), reference.std().item() / math.sqrt(1000))
    assert area.mean().item() == pytest.approx(reference.mean().item(), abs=4 * spread_of_mean)


def test_stochastic_depth_and_drop_connect_have_their_rates_and_means():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1)
    mask = hp.StochasticDepth.draw(x, torch.tensor([0.2, 0.7]).repeat(2000))
    assert mask.shape == (4000, 1, 1)
    for rows, p in ((mask[::2], 0.2), (mask[1::2], 0.7)):
        assert (rows == 0).float().mean().item() == pytest.approx(p, abs=0.05)
        assert rows.mean().item() == pytest.approx(1, abs=0.12)
    weights = weight_mask(torch.ones(100, 100), torch.tensor(0.3))
    assert (weights == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert weights.max() == pytest.approx(1 / 0.7)


def strong(spec, batch):
    """Strengths of an operation at the upper ends of their ranges."""
    return [torch.full((batch,), float(number.high)) for number in spec.numbers.values()]


@pytest.mark.parametrize("spec", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_autocast_changes_no_image(spec, dtype):
    """Half precision has no place for each pixel of a large image."""
    x, results = images(4, 200, dtype), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(spec.function(x, *strong(spec, 4), **spec.defaults))
    assert torch.equal(*results)
    assert not torch.equal(results[0], x)


@pytest.mark.parametrize("spec", AUGMENTATIONS)
def test_half_images_are_those_of_float32_rounded(spec):
    half, results = images(4, 200, torch.bfloat16), []
    for x in (half.float(), half):
        torch.manual_seed(0)
        results.append(spec.function(x, *strong(spec, 4), **spec.defaults))
    torch.testing.assert_close(results[0].bfloat16(), results[1], atol=0.01, rtol=0)


@pytest.mark.parametrize("spec", [spec for spec in AUGMENTATIONS if spec not in (hp.GaussianNoise, hp.MixUp)])
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 5), (6, 3)])
def test_what_is_no_batch_of_images_is_refused(spec, shape):
    """A flip would exchange the examples of a table."""
    with pytest.raises(
        ValueError, match=rf"hp\.{spec.__name__} acts on images \(batch, .* got \({shape[0]}, {shape[1]}"
    ):
        spec.function(torch.rand(shape), *strong(spec, shape[0]), **spec.defaults)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: hp.ColorJitter(), (2, 4, 9, 9), r"need images of 1 or 3 channels, .* got \(2, 4, 9, 9\)"),
        (lambda: hp.Grayscale(), (2, 2, 9, 9), r"need images of 1 or 3 channels, .* got \(2, 2, 9, 9\)"),
        (lambda: hp.GaussianBlur(), (2, 3, 2, 9), r"kernel_size=\(5, 5\) needs images of more than 2 pixels"),
        (
            lambda: hp.Affine(fill=(0.1, 0.2, 0.3)),
            (2, 1, 9, 9),
            r"3 values, .* do not fill images of 1 channels; give one",
        ),
        (
            lambda: hp.Erasing(value=(0.1, 0.2)),
            (2, 3, 9, 9),
            r"2 values, .* do not fill images of 3 channels; give one",
        ),
    ],
)
def test_images_that_a_setting_does_not_fit_are_refused(make, shape, message):
    spec = make()
    with pytest.raises(ValueError, match=message):
        spec.function(torch.rand(shape), *strong(spec, shape[0]), **spec.settings)


# Strengths: zero, bounds, modules' own


@pytest.mark.parametrize("spec", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_strength_zero_is_the_identity_bit_for_bit(spec, dtype):
    x = images(dtype=dtype) if dtype == torch.uint8 else 3 * images() - 1  # also outside of [0, 1]
    strengths = [torch.zeros(len(x)) for _ in spec.numbers]
    assert torch.equal(spec.function(x, *strengths, **spec.defaults), x)


@pytest.mark.parametrize("spec", AUGMENTATIONS)
def test_at_the_bounds_everything_is_finite(spec):
    x = images().requires_grad_()
    for end in ("low", "high"):
        strengths = [torch.full((len(x),), float(getattr(number, end))) for number in spec.numbers.values()]
        y = spec.function(x, *strengths, **spec.defaults)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert y.isfinite().all()
        assert gradient.isfinite().all()
        assert y.shape == x.shape


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_module_is_taken_over_at_its_own_strength(module):
    stn = fxstn.transform(classifier(module, nn.Identity()), example_inputs=images())
    assert list(stn.hparams.values().values()) == pytest.approx(MODULES[module], rel=1e-5)
    assert all(name.startswith("0.") for name in stn.hparams.names)
    x = images()
    assert torch.equal(stn.eval()(x), stn.model[1:](x))  # off in eval mode
    stn.train()
    torch.manual_seed(0)
    first, second = stn(x), stn(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, stn(x))


def test_images_of_bytes_are_augmented_converted_and_normalised():
    before = (
        v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.25] * 3),
    )
    x, model = images(dtype=torch.uint8), classifier(*before)
    stn = fxstn.transform(model, example_inputs=x)
    torch.testing.assert_close(stn.eval()(x), stn.model[3:]((x / 255 - 0.5) / 0.25))
    assert not torch.allclose(stn.train()(x), stn.model[3:]((x / 255 - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (v2.RandomRotation(10, expand=True), "expand=True"),
        (v2.Compose([v2.RandomCrop(4)]), "RandomCrop inside v2.Compose"),
        (v2.RandomAffine(10, fill={torch.Tensor: 1}), "fill per type"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(module, message):
    with pytest.raises(fxstn.TransformError, match=message):
        fxstn.transform(classifier(module), trace="fx")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hp.ColorJitter(init={"color": 0.1}), "init is given for 'color'; its numbers are 'brightness'"),
        (lambda: hp.ColorJitter(high={"hue": 0.7}), "need 0 <= low < high <= 0.5 for hue, got low=0, high=0.7"),
        (lambda: hp.WeightDecay(norm=3), "norm=3 is neither 1 nor 2"),
        (lambda: hp.LabelSmoothing(high=1.0), "high < 1"),
        (lambda: fxstn.transform(classifier(), [hp.StochasticDepth()]), "the model has no such operation"),
        (lambda: fxstn.transform(classifier(), [hp.Flip(), hp.Flip("input")]), "Flip is asked for twice at 'input'"),
        (
            lambda: fxstn.transform(classifier(), [hp.DropConnect("0"), hp.DropConnect()]),
            "DropConnect is asked for twice",
        ),
    ],
)
def test_a_bad_request_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_first_spec_acts_first():
    stn = fxstn.transform(classifier(), [hp.ColorJitter(), hp.Affine(), hp.Cutout(), hp.Dropout("input")])
    drawn = [node.target.__name__ for node in stn.graph("train").graph.nodes if draws(node.target)]
    assert drawn == ["draw_color_jitter", "draw_affine", "draw_cutout", "dropout_mask"]
    assert stn.hparams.names[:2] == ("input.brightness", "input.contrast")
    assert len(stn.hparams) == 11


# Laws


LAW_1 = {
    "in front": (
        classifier(
            v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5),
            v2.Compose([v2.RandomErasing(0.5), v2.RandomHorizontalFlip()]), v2.GaussianBlur(3), v2.GaussianNoise(),
            v2.RandomGrayscale(), v2.RandomRotation(20), v2.Normalize([0.5] * 3, [0.25] * 3),
        ),
        None,
    ),
    "behind a layer": (
        classifier(
            nn.Conv2d(3, 3, 1), v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
            v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5, interpolation=v2.InterpolationMode.BILINEAR, fill=0.3),
            v2.RandomErasing(0.5, value="random"), v2.RandomVerticalFlip(), v2.GaussianBlur(3), v2.GaussianNoise(),
            v2.RandomGrayscale(), v2.RandomRotation(20), v2.Normalize([0.5] * 3, [0.25] * 3),
        ),
        None,
    ),
    "inserted": (classifier(), [hp.ColorJitter(), hp.Affine(), hp.Cutout(), hp.Dropout("0"), hp.DropConnect()]),
    "one untouched": (classifier(v2.ColorJitter(0.3), torchvision.ops.StochasticDepth(0.5, "row")), [hp.StochasticDepth()]),
    "for the whole batch": (classifier(nn.Conv2d(3, 3, 1), torchvision.ops.StochasticDepth(0.5, "batch")), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LAW_1)
def test_the_tangent_is_the_derivative_with_every_operation_in_the_graph(name):
    model, hparams = LAW_1[name]
    report = fxstn.verify(model, images(), hparams=hparams)
    assert report.ok, report


def test_primal_and_tangent_share_one_draw():
    model, _ = LAW_1["behind a layer"]
    stn = fxstn.transform(model).train()
    x, h = images(), len(stn.hparams)
    drawn = [sum(draws(n.target) for n in stn.graph(name).graph.nodes) for name in ("train", "pushforward")]
    assert drawn == [8, 8]
    torch.manual_seed(1)
    y, _ = stn.pushforward(x, delta=torch.randn(6, h), condition=torch.zeros(6, h))
    torch.manual_seed(1)
    torch.randn(6, h)
    buffers = {name: buffer.clone() for name, buffer in stn.named_buffers()}
    torch.testing.assert_close(stn(x), y)
    stn.load_state_dict(buffers, strict=False)


def test_each_example_has_its_own_strength():
    stn = fxstn.transform(nn.Sequential(nn.Conv2d(3, 3, 1)), [hp.ColorJitter(), hp.Affine(), hp.Cutout()]).train()
    x, condition = images(), torch.zeros(6, 10)
    condition[:3] = -60.0  # every strength at its lower end: holes 0, the rest 0
    y, _ = stn.pushforward(x, delta=torch.zeros(10), condition=condition)
    same = (y - stn.model(x)).abs().amax((1, 2, 3)) < 1e-6
    assert same.tolist() == [True] * 3 + [False] * 3


def test_a_strength_for_the_whole_batch_has_one_perturbation():
    stn = fxstn.transform(classifier(), [hp.Dropout("0"), hp.DropConnect("0")], example_inputs=images())
    sample = stn.hparams.sample(50)
    assert len(sample[:, 0].unique()) == 50
    assert len(sample[:, 1].unique()) == 1
    loss = fxstn.response_loss(stn, F.cross_entropy, images(), torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert all(parameter.grad is not None for parameter in stn.response_parameters())


@pytest.mark.nightly
def test_the_graphs_compile_with_every_operation_and_survive_pickling():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 7 * 9, 5))
    specs = [spec() for spec in AUGMENTATIONS if spec is not hp.Rotation]  # its number is called as one of Affine
    stn = fxstn.transform(model, [*specs, hp.DropConnect("2"), hp.LabelSmoothing()])
    twin = pickle.loads(pickle.dumps(stn))
    twin.compile(backend="aot_eager")  # fullgraph=True
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        values = []
        for network in (stn, twin):
            torch.manual_seed(1)
            values.append(loss(network, fxstn.cross_entropy, images(), torch.tensor([0, 1, 2, 3, 4, 0])))
        torch.testing.assert_close(values[1], values[0])


# Losses and penalties


def test_label_smoothing_equals_torch_per_example():
    output, target = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 2, 2])
    smoothing = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    expected = sum(
        F.cross_entropy(output[i : i + 1], target[i : i + 1], label_smoothing=smoothing[i].item()) for i in range(5)
    )
    torch.testing.assert_close(fxstn.cross_entropy(output, target, {"label_smoothing": smoothing}), expected / 5)
    torch.testing.assert_close(fxstn.cross_entropy(output, target), F.cross_entropy(output, target))


# The picture


def test_show_draws_a_row_for_each_number(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra fxstn[plot]")
    specs = [hp.ColorJitter(), hp.Cutout(), hp.Flip()]
    fxstn.show(specs, images(2), tmp_path / "grid.png", columns=3)
    header = (tmp_path / "grid.png").read_bytes()[:24]
    assert int.from_bytes(header[20:]) > 7 * 80  # the height of seven rows, in pixels
    assert strengths_of(specs[1], "holes", 3) == [[0, 8], [2, 8], [5, 8]]
    with pytest.raises(ValueError, match="needs a spec with numbers"):
        fxstn.show([], images(2), tmp_path / "none.png")
    with pytest.raises(ValueError, match="columns=1 must be at least 2"):
        fxstn.show(specs, images(2), tmp_path / "none.png", columns=1)


def test_the_command_that_draws_says_what_there_is(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the extra fxstn[plot]")
    assert main(["show", "Flip", "--columns", "2", "--image-size", "16", "--out", str(tmp_path / "flip.png")]) == 0
    assert (tmp_path / "flip.png").exists()
    assert main(["show", "Flop"]) == 2
    assert "'Flop' is no augmentation; there are ColorJitter" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*AUGMENTATIONS, hp.MixUp, hp.CutMix])
def test_all_frames_of_a_clip_share_the_draw_of_an_image(kind):
    torch.manual_seed(0)
    clips, strengths = torch.rand(5, 3, 4, 12, 14), [min(number.high, 1e3) for number in kind.numbers.values()]
    settings = dict(kind.defaults) | ({"fill": (0.2, 0.4, 0.6)} if "fill" in kind.defaults else {})
    settings |= {"value": None} if "value" in settings else {}

    def run(x):
        torch.manual_seed(1)
        return kind.function(x, *strengths, **settings)

    result = run(clips)
    assert result.shape == clips.shape
    assert not torch.equal(result, clips)
    if kind is hp.GaussianNoise:
        assert not torch.equal(run(clips[:, :, :1].expand_as(clips))[:, :, 0], result[:, :, 1])
    else:
        frames = torch.stack([run(clips[:, :, i]) for i in range(4)], 2)
        torch.testing.assert_close(result, frames, rtol=0, atol=1e-6)


def test_a_video_network_is_tuned_in_augmentations_of_its_clips():
    torch.manual_seed(0)
    model = nn.Sequential(v2.ColorJitter(0.3, 0.3, 0.3, 0.1), v2.RandomAffine(10), v2.RandomErasing(0.5), nn.Conv3d(3, 4, 3),
                          nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5))  # fmt: skip
    clips = torch.rand(4, 3, 3, 9, 11)
    stn = fxstn.transform(model, [hp.ColorJitter(), hp.Affine(), hp.Erasing(), hp.Flip("input")], example_inputs=clips)
    assert stn.per_example(clips)
    assert fxstn.verify(model, clips).ok
