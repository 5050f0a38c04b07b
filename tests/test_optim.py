"""SettlingAdam: its parts alone, against formulas from first principles, and what it does on gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

import fxstn
from fxstn.bilevel import evidence, optim
from fxstn.bilevel.optim import CAUTION, SettlingAdam, set_gap
from fxstn.bilevel.optimizers import adam, sgd
from fxstn.bilevel.updates import Updates

# Parts


def test_the_rate_has_fallen_by_the_root_of_two_after_settle_steps_and_a_run_travels_about_twice_the_root():
    assert optim.falling_rate(0.3, 25.0, 0) == 0.3
    assert optim.falling_rate(0.3, 25.0, 25) == pytest.approx(0.3 / 2**0.5)
    travelled = sum(optim.falling_rate(0.4, 25.0, t) for t in range(100_000))
    assert travelled == pytest.approx(2 * 0.4 * math.sqrt(25 * 100_000), rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_the_squared_weights_are_those_of_adams_mean(count):
    weights = torch.tensor([0.1 * 0.9**k for k in range(count)], dtype=torch.float64)
    assert evidence.squared_weights(count) == pytest.approx((weights / weights.sum()).square().sum().item())


def evidence_of(gradients):
    state: dict[str, torch.Tensor] = {}
    for gradient in gradients:
        result = evidence.update_evidence(gradient, state)
    return result


def weighted_mean(values, memory):
    weights = torch.tensor([memory**k for k in reversed(range(len(values)))], dtype=torch.float64)[:, None]
    return (weights * values).sum(0) / weights.sum()


def test_the_evidence_is_weighted_means_of_gradients_squares_and_what_the_mean_did_not_foresee():
    gradients = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = evidence_of(gradients)
    torch.testing.assert_close(shown.mean / evidence.weight_sum(0.9, 9), weighted_mean(gradients, 0.9))
    torch.testing.assert_close(shown.square / evidence.weight_sum(0.999, 9), weighted_mean(gradients**2, 0.999))
    surprises = torch.stack([
        (gradients[k] - weighted_mean(gradients[:k], 0.9)) ** 2 / (1 + evidence.squared_weights(k)) for k in range(1, 9)
    ])  # fmt: skip
    torch.testing.assert_close(shown.surprise / evidence.weight_sum(0.99, 8), weighted_mean(surprises, 0.99))
    assert shown.count == 9


def test_the_variance_is_that_of_the_mean_over_many_draws():
    """Gradients of variance 4: the estimated squared standard error against the spread of the means of 4,000 numbers."""
    shown = evidence_of(2 * torch.randn(300, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    variance = evidence.squared_weights(300) * shown.surprise.mean() / evidence.weight_sum(0.99, 299)
    assert variance.item() == pytest.approx(shown.mean.var().item(), rel=0.1)


def gate(z, certainty, count=1e9):
    """The gate of means z times their standard errors, after so many gradients."""
    mean = torch.tensor(z, dtype=torch.float64)
    surprise = mean.new_full(mean.shape, evidence.weight_sum(0.99, count - 1) / evidence.squared_weights(count))
    shown = evidence.Evidence(mean * evidence.weight_sum(0.9, count), mean.square(), surprise, count)
    return evidence.noise_gate(shown, certainty, torch.ones_like(mean)).tolist()


def test_the_gate_of_one_number_opens_with_its_evidence():
    """1 − q/z² with q = 1 + 2√2; together, a squared z counts as 9 at most."""
    q = 1 + 2 * math.sqrt(2)
    assert gate([1.0], 2.0) == gate([-math.sqrt(q)], 2.0) == pytest.approx([0.0], abs=1e-12)
    assert gate([2.5], 2.0) == pytest.approx([1 - q / 6.25])
    assert gate([-2.5], 2.0) == gate([2.5], 2.0)
    assert gate([1e6], 2.0) == pytest.approx([1.0])


def test_the_gate_opens_for_each_by_what_all_show_together_and_no_single_one_speaks_for_all():
    q4 = 4 + 2 * math.sqrt(8)
    assert gate([1.7] * 4, 2.0) == pytest.approx([1 - q4 / (4 * 1.7**2)] * 4)
    assert gate([50.0, 0.0, 0.0, 0.0], 2.0)[1:] == [0.0] * 3
    assert gate([50.0, 1.0, 1.0, 1.0], 2.0)[1] == pytest.approx(1 - q4 / 12)


def test_nothing_is_certain_before_a_second_gradient_and_little_before_a_third():
    assert gate([9.0], 0.0, count=1) == [0.0]
    assert gate([1.5], 0.0, count=2) == [0.0]
    assert gate([1.5], 0.0)[0] > 0.5


@pytest.mark.parametrize(
    ("rises", "gap", "position", "needed"),
    [(True, 0.3, 0.5, 0.7), (False, 0.3, 0.5, 0.3), (True, 0.3, 0.95, 0.85), (False, 0.3, 0.95, 0.3),
     (True, 0.3, 1.0, 1.0), (False, 0.3, 0.05, 0.65), (False, 0.3, 0.0, 1.0), (True, 1.0, 0.1, 0.0)],
)  # fmt: skip
def test_steps_that_the_gap_favours_need_less_certainty_and_steps_to_an_end_all_of_it(rises, gap, position, needed):
    share = optim.needed_certainty(torch.tensor([rises]), gap, torch.tensor([position]))
    torch.testing.assert_close(share, torch.tensor([needed]))


@pytest.mark.parametrize(
    ("train", "valid", "share"),
    [(0.3, 0.4, 0.25), (0.0, 2.0, 1.0), (0.5, 0.4, 0.0), (-0.1, 0.4, None), (-0.5, -0.4, None), (0.0, 0.0, None),
     (math.nan, 0.4, None), (math.inf, 0.4, None)],
)  # fmt: skip
def test_the_gap_is_what_the_validation_loss_can_lose_at_most(train, valid, share):
    assert optim.generalisation_gap(train, valid) == (None if share is None else pytest.approx(share))


# The optimizer


def test_it_is_public():
    assert fxstn.optim.SettlingAdam is SettlingAdam


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"lr": -1}, {"lr": math.inf}, {"lr": math.nan}, {"settle": -1.0}, {"settle": math.nan}, {"certainty": -0.1},
     {"certainty": math.nan}, {"certainty": math.inf}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_for_all_and_for_a_group(bad):
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    message = f"{next(iter(bad))}={next(iter(bad.values()))} must be "
    with pytest.raises(ValueError, match=f"^SettlingAdam: {message}"):
        SettlingAdam([x], **bad)
    with pytest.raises(ValueError, match=f"^SettlingAdam, group 1: {message}"):
        SettlingAdam([{"params": [x]}, {"params": [y], **bad}])
    optimizer = SettlingAdam([x])
    with pytest.raises(ValueError, match=f"^SettlingAdam, group 1: {message}"):
        optimizer.add_param_group({"params": [y], **bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"lr": "0.1"}, "lr='0.1' must be a number, positive and finite"), ({"lr": None}, "lr=None must be a number"),
     ({"settle": True}, "settle=True must be a number"), ({"certainty": [2]}, r"certainty=\[2\] must be a number"),
     ({"limits": 1}, "limits=1 must be True or False"), ({"position": 3}, "position=3 must be a function of a parameter")],
)  # fmt: skip
def test_arguments_of_another_type_are_refused(bad, message):
    with pytest.raises(TypeError, match=f"^SettlingAdam: {message}"):
        SettlingAdam([nn.Parameter(torch.zeros(1))], **bad)


def test_a_group_that_cannot_be_meant_is_refused_and_not_added():
    optimizer = SettlingAdam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"^SettlingAdam, group 1: gap=3 must be a share in \[0, 1\], or None"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "gap": 3})
    with pytest.raises(
        TypeError, match=r"^SettlingAdam, group 1: a parameter of torch\.complex64 cannot be stepped; give floating"
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_every_group_has_its_own_options():
    """Each number moves as in an optimizer of its own."""
    options = [{"lr": 0.01}, {"settle": 2.0, "certainty": None}, {"certainty": 0.1}]
    gradients = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) + 2
    grouped, alone = ([nn.Parameter(torch.zeros(1)) for _ in options] for _ in range(2))
    together = SettlingAdam([{"params": [x], **own} for x, own in zip(grouped[:2], options, strict=False)], lr=0.3)
    together.add_param_group({"params": [grouped[2]], **options[2]})
    optimizers = [SettlingAdam([x], **{"lr": 0.3} | own) for x, own in zip(alone, options, strict=True)]
    for gradient in gradients:
        for x, y, each in zip(grouped, alone, gradient, strict=True):
            x.grad, y.grad = each[None].clone(), each[None].clone()
        for optimizer in (together, *optimizers):
            optimizer.step()
    assert [x.item() for x in grouped] == [y.item() for y in alone]
    assert len({x.item() for x in grouped}) == 3


@pytest.mark.parametrize("cls", [SettlingAdam, torch.optim.Adam])
def test_a_scheduler_acts(cls):
    """Two steps at each rate of a StepLR by 0.1, with an optimizer whose own rate does not fall."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = cls([x], lr=1.0, **({"settle": math.inf, "certainty": None} if cls is SettlingAdam else {}))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    places = []
    for _ in range(3):
        for _ in range(2):
            x.grad = torch.full((1,), -1.0, dtype=torch.float64)
            optimizer.step()
        places.append(x.item())
        scheduler.step()
    assert places == pytest.approx([2.0, 2.2, 2.22])


def test_the_rate_falls_from_what_a_scheduler_says():
    x = nn.Parameter(torch.zeros(1))
    optimizer = SettlingAdam([x], lr=0.5, settle=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    assert optim.learning_rate(optimizer) == 0.5
    for step in range(4):
        x.grad = torch.ones(1)
        optimizer.step()
        assert optim.learning_rate(optimizer) == pytest.approx(0.5 * 0.1**step / math.sqrt(1 + step))
        scheduler.step()


SCHEDULERS = {
    "StepLR": lambda o: lr.StepLR(o, 2, 0.1),
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.7, total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.1, 0.7, 3, cycle_momentum=False),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, 1.0, 2), lr.LambdaLR(o, lambda t: 1 / (1 + t))], [2]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, 1.0, 2), lr.ExponentialLR(o, 0.9)], optimizer=o),
}  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("factory", [SettlingAdam, torch.optim.Adam])
def test_a_rate_that_a_run_lowers_stays_lowered_whatever_schedules_it(factory, scheduler):
    """Halved after three steps, against the same course without that."""
    courses = []
    for factor in (1.0, 0.5):
        optimizer = factory([nn.Parameter(torch.zeros(1))], lr=0.4)
        updates = Updates({"o": optimizer}, {"o": scheduler}, None, None, {})
        rates = []
        for step in range(9):
            if step == 3:
                assert updates.slow("o", factor) == pytest.approx(factor * rates[-1])
            optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
            updates.step("o")
            rates.append(optim.learning_rate(optimizer))
            if step != 2:
                updates.end_epoch(0.0)
        courses.append(rates)
    assert courses[1] == pytest.approx([*courses[0][:3], *(0.5 * rate for rate in courses[0][3:])])


# What parameters and gradients may be


@pytest.mark.parametrize("certainty", [None, 2.0])
@pytest.mark.parametrize("large", [1e20, -3e38])
def test_one_large_gradient_leaves_x_finite_and_moves_it_as_adam_does(certainty, large):
    places = {}
    for cls, options in ((SettlingAdam, {"certainty": certainty, "settle": math.inf}), (torch.optim.Adam, {})):
        x = nn.Parameter(torch.ones(2))
        optimizer = cls([x], lr=1e-3, **options)
        for gradient in (1, large, 1, 1):
            x.grad = torch.tensor([gradient, 1.0])
            optimizer.step()
        places[cls] = x.detach()
    assert places[SettlingAdam].isfinite().all()
    if certainty is None and large == 1e20:  # beyond, Adam's own squares overflow
        torch.testing.assert_close(places[SettlingAdam], places[torch.optim.Adam], rtol=1e-6, atol=0)
    if certainty is not None:  # what is sure still moves
        assert places[SettlingAdam][1] < 1


def test_an_infinite_gradient_is_not_hidden():
    x = nn.Parameter(torch.ones(1))
    optimizer = SettlingAdam([x], certainty=None)
    x.grad = torch.tensor([math.inf])
    optimizer.step()
    assert x.isnan().all()


@pytest.mark.parametrize("gradient", [0.0, 1e-42, 1e-20])
def test_gradients_of_hardly_any_size_hardly_move_x(gradient):
    """Adam's steps end below 1e-8."""
    places = settled(torch.full((20, 3), gradient), 2.0)
    assert places.isfinite().all()
    assert places.abs().max() <= 20 * 0.1 * gradient / 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_of_half_precision_has_averages_of_float32_also_after_a_resume(dtype):
    """Against a parameter of float32 with the same gradients; its own steps are rounded."""
    gradients = (0.5 + torch.randn(30, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    half, full = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(3))
    optimizer, reference = SettlingAdam([half], lr=0.1), SettlingAdam([full], lr=0.1)
    set_gap(optimizer, 0.5, [True] * 3)
    for step, gradient in enumerate(gradients):
        half.grad, full.grad = gradient.clone(), gradient.float()
        optimizer.step()
        reference.step()
        if step == 15:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SettlingAdam([half])
            optimizer.load_state_dict(saved)
    assert half.dtype == dtype
    for key in ("mean", "square", "surprise"):
        assert torch.equal(optimizer.state[half][key], reference.state[full][key])
    assert half.isfinite().all()
    assert half.any()


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (1, 0, 2)])
@pytest.mark.parametrize("gap", [None, 0.3])
def test_a_parameter_of_any_shape_moves_as_its_numbers_in_a_row(shape, gap):
    size = math.prod(shape)
    gradients = 1 + torch.randn(20, size, generator=torch.Generator().manual_seed(0))
    limited = [number % 2 == 0 for number in range(size)]
    places = []
    for form in (shape, (size,)):
        x = nn.Parameter(torch.zeros(form))
        optimizer = SettlingAdam([x], position=torch.sigmoid)
        set_gap(optimizer, gap, limited)
        for gradient in gradients:
            x.grad = gradient.reshape(form).clone()
            optimizer.step()
        assert x.shape == torch.Size(form)
        places.append(x.detach().flatten())
    assert torch.equal(*places)


def test_groups_and_parameters_of_several_sizes_are_limited_each_by_its_own_numbers():
    x, y, z = (nn.Parameter(torch.zeros(shape)) for shape in ((2,), (), (1, 3)))
    optimizer = SettlingAdam([{"params": [x, y]}, {"params": [z], "lr": 0.2}], lr=0.1, certainty=None)
    set_gap(optimizer, 0.25, [True, False, True, False, True, True])
    for parameter in (x, y, z):
        parameter.grad = -torch.ones_like(parameter)
    optimizer.step()
    moved = torch.cat([parameter.detach().flatten() for parameter in (x, y, z)])
    expected = torch.tensor([0.025, 0.1, 0.025, 0.2, 0.05, 0.05])
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("gap", "flags", "message"),
    [(0.5, [True] * 3, r"regularizing has 3 entries for parameters of 6 numbers in all; give one entry for each number"),
     (0.5, [], "regularizing has 0 entries"), (1.5, [True] * 6, r"gap=1\.5 must be a share in \[0, 1\], or None"),
     (math.nan, [True] * 6, "gap=nan must be"), ("0.5", [True] * 6, "gap='0.5' must be")],
)  # fmt: skip
def test_a_gap_that_cannot_be_meant_is_refused_and_changes_nothing(gap, flags, message):
    groups = [{"params": [nn.Parameter(torch.zeros(3))]} for _ in range(2)]
    optimizer = SettlingAdam(groups)
    with pytest.raises(ValueError, match=f"^set_gap: {message}"):
        set_gap(optimizer, gap, flags)
    assert [(group["gap"], group["limited"]) for group in optimizer.param_groups] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("position", "got"), [(lambda x: x[:2], r"shape \(2,\)"), (torch.mean, r"shape \(\)"), (lambda x: 0.5, "float")]
)
def test_a_position_of_another_shape_is_refused(position, got):
    x = nn.Parameter(torch.zeros(3))
    optimizer = SettlingAdam([x], position=position)
    set_gap(optimizer, 0.5, [True] * 3)
    x.grad = torch.ones(3)
    with pytest.raises(
        ValueError, match=rf"position returns {got} for a parameter of shape \(3,\); return a tensor of that"
    ):
        optimizer.step()


# How it goes on


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    x = nn.Parameter(torch.ones(1))
    optimizer = SettlingAdam([x], certainty=None)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert x.item() < 1


def test_a_copy_of_it_goes_on_alike():
    gradients = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    x = nn.Parameter(torch.full((3,), -4.0))  # near the lower end
    optimizer = SettlingAdam([x], certainty=0.5, position=torch.sigmoid)
    set_gap(optimizer, 0.7, [True] * 3)
    for number, gradient in enumerate(gradients):
        if number == 10:
            y, other = copy.deepcopy((x, optimizer))
        x.grad = gradient.clone()
        optimizer.step()
    for gradient in gradients[10:]:
        y.grad = gradient.clone()
        other.step()
    assert torch.equal(x, y)
    assert (x != -4.0).any()


def test_the_rate_of_lambda_falls_with_the_steps_done_and_a_resumed_run_goes_on_where_it_was():
    weight = torch.nn.Parameter(torch.ones(2))

    def rate_of_step(optimizer, number, done=0):
        for _ in range(number - done + 1):
            weight.grad = torch.ones(2)
            optimizer.step()
        return optim.learning_rate(optimizer)

    first = SettlingAdam([weight], lr=0.2, settle=25)
    assert rate_of_step(first, 0) == 0.2
    assert rate_of_step(first, 75, done=1) == pytest.approx(0.1)
    other = SettlingAdam([weight])
    other.load_state_dict(first.state_dict())
    assert rate_of_step(other, 200, done=76) == pytest.approx(0.2 / 3)


def settled(gradients, certainty):
    """Where x gets from zero on these gradients, (steps, h), at a rate that does not fall."""
    x = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = SettlingAdam([x], lr=0.1, settle=1e12, certainty=certainty)
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    return x.detach()


def test_without_certainty_it_is_adam():
    gradients = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    adam = torch.nn.Parameter(torch.zeros(6))
    expected = torch.optim.Adam([adam], lr=0.1)
    for gradient in gradients:
        adam.grad = gradient.clone()
        expected.step()
    torch.testing.assert_close(settled(gradients, None), adam.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("h", [1, *[pytest.param(h, marks=pytest.mark.nightly) for h in (3, 19)]])
def test_noise_does_not_move_lambda_and_a_sure_gradient_does_and_drags_no_other_along(h):
    """Root mean squares over 20 draws of 200 steps."""
    draws = [torch.randn(200, h, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    sure = [noise + 3.0 * (torch.arange(h) == 0) for noise in draws]

    def far(gradients, certainty, first=0):
        return torch.stack([settled(g, certainty)[first:] for g in gradients]).square().mean().sqrt().item()

    assert far(draws, 2.0) < 0.3 * far(draws, None)
    assert far([g[:, :1] for g in sure], 2.0) > 0.8 * far([g[:, :1] for g in sure], None)
    if h > 1:
        assert far(sure, 2.0, first=1) < 0.4 * far(sure, None, first=1)


def test_what_each_gradient_alone_does_not_show_all_together_do():
    """Gradients of half their noise: a number of its own mostly stays, one among 19 that agree in this moves."""
    gradients = 0.5 + torch.randn(100, 19, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([settled(gradients[:, i : i + 1], 2.0) for i in range(19)])
    assert settled(gradients, 2.0).mean() < 1.5 * alone.mean() < 0


def test_a_gradient_that_changes_slowly_is_not_taken_for_a_noisy_one():
    """From 5 to 1 in 100 steps, noise 0.1: the deviation from its mean is large, that from the last ones is not."""
    gradients = torch.linspace(5, 1, 100)[:, None] + 0.1 * torch.randn(
        100, 1, generator=torch.Generator().manual_seed(0)
    )
    assert settled(gradients, 2.0).item() == pytest.approx(settled(gradients, None).item(), rel=0.1)


# The gap


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.25, [-1.0, 0.25, 1.0]), (0.0, [-1.0, 0.0, 1.0]), (None, [-1.0, 1.0, 1.0])]
)
def test_steps_that_raise_a_regularisation_are_multiplied_by_the_gaps_share(gap, expected):
    """Gradients that say down, up and up; the last number does not regularise."""
    x = nn.Parameter(torch.zeros(3))
    optimizer = SettlingAdam([x], lr=0.1, certainty=None)
    set_gap(optimizer, gap, [True, True, False])
    x.grad = torch.tensor([1.0, -1.0, -1.0])
    optimizer.step()
    assert (x.detach() / 0.1).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_optimizer_that_knows_no_gap_is_left_alone():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    before = copy.deepcopy(optimizer.param_groups)
    set_gap(optimizer, 0.25, [True])
    assert optimizer.param_groups == before


def walk(gradients, gap, certainty, start=0.0, limited=None):
    """How far logits get on gradients (steps, h), from a start on which their place in a range depends; in steps so small that
    it stays, and in units of these."""
    x = nn.Parameter(torch.full_like(gradients[0], start))
    optimizer = SettlingAdam([x], lr=1e-6, settle=1e12, certainty=certainty, position=torch.sigmoid)
    set_gap(optimizer, gap, [True] * gradients.shape[1] if limited is None else limited)
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    return (x.detach() - start) / 1e-6


@pytest.fixture
def incautious(monkeypatch):
    """Uncertain steps are not shortened besides."""
    monkeypatch.setattr(optim, "CAUTION", 0.0)


DOWN = torch.rand(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # of one sign, and many sizes
UP = -DOWN


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("place", "above", "below"), [(1e-9, 1.0, 0.0), (0.05, 1.0, 0.5), (0.5, 1.0, 1.0), (0.95, 0.5, 1.0), (1 - 1e-9, 0.0, 1.0)]
)  # fmt: skip
def test_the_gap_says_which_way_less_evidence_is_enough_and_ends_of_ranges_ask_for_all_of_it(
    incautious, gap, place, above, below
):
    """Reference: an optimizer without a gap, of the certainty that is left."""
    certainty, start = 20.0, math.log(place / (1 - place))
    assert 0 < walk(UP, None, certainty) < 0.5 * walk(UP, None, 0.0)
    up = gap * walk(UP, None, certainty * (1 - gap * above))
    down = walk(DOWN, None, certainty * (1 - (1 - gap) * below))
    torch.testing.assert_close(walk(UP, gap, certainty, start), up, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(walk(DOWN, gap, certainty, start), down, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gap", [0.3, 0.9])
def test_each_number_needs_a_certainty_of_its_own_of_what_all_together_show(incautious, gap):
    """Sixteen numbers, every second of which goes up; alone none would go far. Reference: as above, one for each number."""
    certainty, limited = 4.0, [True, True, False, False] * 4
    sizes = torch.rand(60, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    gradients = sizes * torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)
    together = walk(gradients, None, certainty)
    alone = torch.cat([walk(gradients[:, i : i + 1], None, certainty) for i in range(16)])
    assert alone.abs().mean() < 0.5 * together.abs().mean()
    for i, got in enumerate(walk(gradients, gap, certainty, limited=limited)):
        share, factor = (1.0, 1.0) if not limited[i] else (1 - gap, gap) if i % 2 else (gap, 1.0)
        expected = factor * walk(gradients, None, certainty * share)[i]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gap", [None, 0.0, 0.3, 1.0])
def test_the_less_certain_a_step_is_the_shorter_it_gets_where_a_network_overfits(monkeypatch, gap):
    """The certainty of each step is what it is shorter by than one without noise, where nothing is cautious."""
    gradients = 0.5 + torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def steps(certainty):
        places = [walk(gradients[:end], gap, certainty, limited=[False]) for end in range(1, len(gradients) + 1)]
        return torch.cat(places).diff()

    cautious = steps(0.5)
    monkeypatch.setattr(optim, "CAUTION", 0.0)
    plain = steps(0.5)
    certain = plain / steps(None)
    assert 0.1 < certain.mean() < 0.5
    assert certain.max() > 0.75
    torch.testing.assert_close(cautious, plain * (1 - CAUTION * (gap or 0.0) * (1 - certain)), rtol=1e-6, atol=1e-6)


def test_without_a_position_no_number_is_near_an_end():
    """The same far out as in the middle."""
    steps = []
    for start in (0.0, 30.0):
        x = nn.Parameter(torch.full((1,), start, dtype=torch.float64))
        optimizer = SettlingAdam([x], lr=1e-6, settle=1e12, certainty=20.0)
        set_gap(optimizer, 0.9, [True])
        for gradient in UP:
            x.grad = gradient.clone()
            optimizer.step()
        steps.append(x.item() - start)
    assert steps[0] == pytest.approx(steps[1], rel=1e-6) != 0


# The defaults of a run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("default", [sgd, adam])
def test_a_default_moves_every_entry_of_whatever_type(default, dtype):
    """Of as many entries as torch 2.9's fused SGD for half precision leaves alone on the CPU."""
    weight = torch.nn.Parameter(torch.zeros(96, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    default([weight]).step()
    torch.testing.assert_close(weight.detach().double(), torch.full((96,), -0.01).double(), rtol=1e-2, atol=0)
