"""SettlingAdam: its parts alone, against formulas from first principles, and what it does on gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fxstn
from fxstn.bilevel import optim
from fxstn.bilevel.optim import SettlingAdam, set_gap

# Parts


def test_the_rate_has_fallen_by_the_root_of_two_after_settle_steps_and_a_run_travels_about_twice_the_root():
    assert optim.falling_rate(0.3, 25.0, 0) == 0.3
    assert optim.falling_rate(0.3, 25.0, 25) == pytest.approx(0.3 / 2**0.5)
    travelled = sum(optim.falling_rate(0.4, 25.0, t) for t in range(100_000))
    assert travelled == pytest.approx(2 * 0.4 * math.sqrt(25 * 100_000), rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_the_squared_weights_are_those_of_adams_mean(count):
    weights = torch.tensor([0.1 * 0.9**k for k in range(count)], dtype=torch.float64)
    assert optim.squared_weights(count) == pytest.approx((weights / weights.sum()).square().sum().item())


def evidence_of(gradients):
    state: dict[str, torch.Tensor] = {}
    for gradient in gradients:
        evidence = optim.update_evidence(gradient, state)
    return evidence


def weighted_mean(values, memory):
    weights = torch.tensor([memory**k for k in reversed(range(len(values)))], dtype=torch.float64)[:, None]
    return (weights * values).sum(0) / weights.sum()


def test_the_evidence_is_weighted_means_of_gradients_squares_and_what_the_mean_did_not_foresee():
    gradients = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evidence = evidence_of(gradients)
    torch.testing.assert_close(evidence.mean, weighted_mean(gradients, 0.9))
    torch.testing.assert_close(evidence.square, weighted_mean(gradients**2, 0.999))
    surprises = torch.stack([
        (gradients[k] - weighted_mean(gradients[:k], 0.9)) ** 2 / (1 + optim.squared_weights(k)) for k in range(1, 9)
    ])  # fmt: skip
    torch.testing.assert_close(evidence.variance, optim.squared_weights(9) * weighted_mean(surprises, 0.99))
    assert evidence.surprises == 8


def test_the_variance_is_that_of_the_mean_over_many_draws():
    """Gradients of variance 4: the estimated squared standard error against the spread of the means of 4,000 numbers."""
    evidence = evidence_of(2 * torch.randn(300, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert evidence.variance.mean().item() == pytest.approx(evidence.mean.var().item(), rel=0.1)


def evidence(z, surprises=1e9):
    mean = torch.tensor(z, dtype=torch.float64)
    return optim.Evidence(mean, mean.square(), torch.ones_like(mean), surprises)


def gate(z, certainty):
    return optim.noise_gate(evidence(z), torch.full((len(z),), certainty, dtype=torch.float64)).tolist()


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
    certainty = torch.zeros(1, dtype=torch.float64)
    assert optim.noise_gate(evidence([9.0], 0), certainty).item() == 0
    assert optim.noise_gate(evidence([1.5], 1), certainty).item() == 0
    assert optim.noise_gate(evidence([1.5], 1e9), certainty).item() > 0.5


@pytest.mark.parametrize(
    ("rises", "gap", "position", "needed"),
    [(True, 0.3, 0.5, 0.7), (False, 0.3, 0.5, 0.3), (True, 0.3, 0.95, 0.85), (False, 0.3, 0.95, 0.3),
     (True, 0.3, 1.0, 1.0), (False, 0.3, 0.05, 0.65), (False, 0.3, 0.0, 1.0), (True, 1.0, 0.1, 0.0)],
)  # fmt: skip
def test_steps_that_the_gap_favours_need_less_certainty_and_steps_to_an_end_all_of_it(rises, gap, position, needed):
    share = optim.needed_certainty(torch.tensor([rises]), torch.tensor(gap), torch.tensor([position]))
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


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"settle": -1.0}, {"certainty": -0.1}, {"certainty": math.nan}])
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        SettlingAdam([nn.Parameter(torch.zeros(1))], **bad)


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
        return optimizer.param_groups[0]["lr"]

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


@pytest.mark.parametrize("h", [1, 3, 19])
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


DOWN = torch.rand(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # of one sign, and many sizes
UP = -DOWN


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("place", "above", "below"), [(1e-9, 1.0, 0.0), (0.05, 1.0, 0.5), (0.5, 1.0, 1.0), (0.95, 0.5, 1.0), (1 - 1e-9, 0.0, 1.0)]
)  # fmt: skip
def test_the_gap_says_which_way_less_evidence_is_enough_and_ends_of_ranges_ask_for_all_of_it(gap, place, above, below):
    """Reference: an optimizer without a gap, of the certainty that is left."""
    certainty, start = 20.0, math.log(place / (1 - place))
    assert 0 < walk(UP, None, certainty) < 0.5 * walk(UP, None, 0.0)
    up = gap * walk(UP, None, certainty * (1 - gap * above))
    down = walk(DOWN, None, certainty * (1 - (1 - gap) * below))
    torch.testing.assert_close(walk(UP, gap, certainty, start), up, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(walk(DOWN, gap, certainty, start), down, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gap", [0.3, 0.9])
def test_each_number_needs_a_certainty_of_its_own_of_what_all_together_show(gap):
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
