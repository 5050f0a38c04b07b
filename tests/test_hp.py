"""Hyperparameters: bijections, perturbations, specs and what is wrong with them."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.hp import Hyperparameter, HyperparameterSpace
from fxstn.ops.noise import keep_rates
from tests.nets import SmallConv, mlp

SPACE = [
    Hyperparameter(0.05, 0.0, 0.95, name="rate"),
    Hyperparameter(1e-4, 1e-7, 1e-1, log=True, name="decay"),
    Hyperparameter(3.0, 0.0, math.inf, name="any"),
    Hyperparameter(1, 0.0, 5.0, integer=True, name="holes"),
]


@pytest.mark.parametrize("where", [(), ("*",), ("1",)])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_an_init_that_the_user_gives_wins_over_the_strength_of_the_module(where, own):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(own), nn.Linear(4, 2))
    stn = fxstn.transform(model, [hp.Dropout(*where, init=0.3)])
    assert stn.hparams.values()["1.dropout"] == pytest.approx(0.3)


def test_an_init_by_name_wins_for_that_name_only():
    model = nn.Sequential(v2.ColorJitter(0.2, 0.3, 0.4, 0.05), nn.Flatten(), nn.Linear(48, 2))
    values = fxstn.transform(model, [hp.ColorJitter(init={"contrast": 0.1})]).hparams.values()
    assert [round(values[f"0.{name}"], 6) for name in ("brightness", "contrast", "saturation")] == [0.2, 0.1, 0.4]


def test_a_start_outside_the_range_is_refused_where_a_module_is_taken_over():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"1\.dropout: init=1.5 is not strictly between"):
        fxstn.transform(model, [hp.Dropout(init=1.5)])


def test_the_start_is_where_it_was_asked_to_be():
    values = HyperparameterSpace(SPACE).double().values()
    assert values == pytest.approx({"rate": 0.05, "decay": 1e-4, "any": 3.0, "holes": 1.0}, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-200, 80), min_size=4, max_size=4))
def test_constrained_values_stay_in_range_and_finite(unconstrained):
    space = HyperparameterSpace(SPACE)
    u = torch.tensor(unconstrained, requires_grad=True)
    values = space.bijection(u)
    assert torch.isfinite(values).all()
    for value, q in zip(values.tolist(), SPACE, strict=True):
        assert q.low * (1 - 1e-5) <= value <= q.high * (1 + 1e-5)
    (gradient,) = torch.autograd.grad(values.sum(), u)
    assert torch.isfinite(gradient).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.999))
def test_the_bijection_inverts(share):
    for log in (False, True):
        low, high = 1e-3, 2.0
        init = low * (high / low) ** share if log else low + share * (high - low)
        one = Hyperparameter(init, low, high, log=log, name="q")
        space = HyperparameterSpace([one]).double()
        assert space.values()["q"] == pytest.approx(init, rel=1e-4)


INTEGERS = {
    "linear": Hyperparameter(1, 0, 5, integer=True, name="k"),
    "log": Hyperparameter(4, 3, 1000, log=True, integer=True, name="k"),
    "negative": Hyperparameter(0, -7, 3, integer=True, name="k"),
    "two": Hyperparameter(1, 0, 1, integer=True, name="k"),
}


def test_integers_are_floored_per_example():
    space = HyperparameterSpace([INTEGERS["linear"]])
    values = space.bijection(torch.tensor([[-1e3], [-9.0], [0.0], [0.6], [9.0], [1e3]]))  # of [0, 6)
    assert values.flatten().tolist() == [0.0, 0.0, 3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("kind", INTEGERS)
def test_every_integer_of_a_range_can_be_the_start_and_can_be_set(kind):
    one = INTEGERS[kind]
    space = HyperparameterSpace([one])
    for value in range(int(one.low), int(one.high) + 1):
        assert HyperparameterSpace([replace(one, init=value)]).values() == {"k": value}
        space.set({"k": value})
        assert space.values() == {"k": value}


@pytest.mark.parametrize("kind", INTEGERS)
def test_every_integer_of_a_range_has_its_share_of_the_real_line(kind):
    one = INTEGERS[kind]
    share = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    values = HyperparameterSpace([one]).double().bijection(torch.logit(share)[:, None]).flatten()
    edges = torch.arange(one.low, one.high + 2, dtype=torch.float64)  # k lies in [k, k + 1)
    edges = edges.log() if one.log else edges
    expected = edges.diff() / (edges[-1] - edges[0])
    counts = torch.bincount((values - one.low).long(), minlength=len(expected)) / len(values)
    torch.testing.assert_close(counts, expected, atol=2e-5, rtol=0, check_dtype=False)


def test_a_positive_integer_without_upper_end_starts_and_stays_where_it_is_put():
    space = HyperparameterSpace([Hyperparameter(7, 0, math.inf, integer=True, name="k")])
    assert space.values() == {"k": 7}
    for value in (0, 1, 1000):
        space.set({"k": value})
        assert space.values() == {"k": value}


def test_a_schedule_of_integers_is_replayed_as_it_was():
    space, column = HyperparameterSpace([INTEGERS["linear"]]), [0, 5, 5, 3]
    schedule = fxstn.Schedule({"k": column})
    for k, value in enumerate(column):
        space.set(schedule.at(k))
        assert space.values() == {"k": value}
    for share in torch.linspace(
        0, 1, 1001, dtype=torch.float64
    ).tolist():  # (1 - share) · 5 + share · 5 is not always 5
        space.set(schedule.at(1 + share))
        assert space.values() == {"k": 5}


@pytest.mark.parametrize(("end", "sides"), [("low", (0, 2)), ("high", (5, 24))])
def test_cutout_starts_at_both_ends_of_its_ranges(end, sides):
    holes, length = sides
    stn = fxstn.transform(SmallConv(), [hp.Cutout("input", init={"holes": holes, "length": length})])
    assert list(stn.hparams.values().values()) == [holes, length]
    stn.hparams.set({name: {"holes": 1, "length": 4}[name.rpartition(".")[2]] for name in stn.hparams.names})
    stn.hparams.set(dict(zip(stn.hparams.names, sides, strict=True)))
    assert list(stn.hparams.values().values()) == [holes, length]


def test_the_loss_function_is_given_both_ends_of_an_integer():
    stn = fxstn.transform(mlp(), [hp.Scalar("k", 2, 1, 3, integer=True)])
    strengths = stn.hparams(torch.tensor([[-30.0], [0.0], [30.0]]))
    assert stn.hparams.named(strengths)["k"].tolist() == [1, 2, 3]


def test_samples_have_scale_sigma_and_carry_its_gradient():
    space = HyperparameterSpace(
        [Hyperparameter(0.5, 0, 1, scale=0.3, name="a"), Hyperparameter(0.5, 0, 1, scale=2.0, name="b")]
    )
    samples = space.sample(20000)
    assert samples.shape == (20000, 2)
    torch.testing.assert_close(samples.std(0), torch.tensor([0.3, 2.0]), rtol=0.03, atol=0)
    samples.square().mean().backward()
    assert (space.raw_scale.grad > 0).all()


def test_entropy_is_that_of_a_gaussian():
    space = HyperparameterSpace(
        [Hyperparameter(0.5, 0, 1, scale=0.3, name="a"), Hyperparameter(0.5, 0, 1, scale=2.0, name="b")]
    )
    expected = torch.distributions.Normal(0, torch.tensor([0.3, 2.0])).entropy().sum()
    torch.testing.assert_close(space.entropy(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hyperparameter(2.0, 0.0, 1.0, name="q"), r"q: init=2.0 is not strictly between low=0.0 and high=1.0"),
        (lambda: Hyperparameter(0.0, 0.0, 1.0, name="q"), "not strictly between"),
        (lambda: Hyperparameter(0.5, 1.0, 1.0, name="q"), "not below"),
        (lambda: Hyperparameter(0.5, 0.0, 1.0, scale=0.0, name="q"), "scale=0.0"),
        (lambda: Hyperparameter(0.5, 0.0, 1.0, log=True, name="q"), "low > 0"),
        (lambda: Hyperparameter(0.5, 0.1, math.inf, name="q"), "low=0"),
        (lambda: Hyperparameter(6, 0, 5, integer=True, name="q"), "q: init=6 is not between low=0 and high=5"),
        (lambda: Hyperparameter(2, 0.5, 5, integer=True, name="q"), "q: the range of an integer needs whole ends"),
        (lambda: Hyperparameter(math.inf, 0, math.inf, integer=True, name="q"), "q: init=inf must be a whole number"),
        (lambda: Hyperparameter(2.5, 0, 5, integer=True, name="q"), r"q: init=2\.5 must be a whole number"),
        (
            lambda: Hyperparameter(2, 0, 2**24, integer=True, name="q"),
            r"q: low=0 and high=16777216 must be within 2\*\*23 ",
        ),
        (
            lambda: Hyperparameter(2, -(2**24) - 1, 3, integer=True, name="q"),
            r"q: low=-16777217 .* give a narrower range",
        ),
        (lambda: Hyperparameter(0, -(2**23) - 1, 2**23, integer=True, name="q"), r"so must their distance"),
        (lambda: Hyperparameter(1.0, 0.0, 1e39, name="q"), r"q: low=0\.0 and high=1e\+39 must be within 3\.4e\+38"),
        (
            lambda: Hyperparameter(1.0, -3e38, 3e38, name="q"),
            r"q: low=-3e\+38 and high=3e\+38 .* so must their distance",
        ),
        (lambda: hp.Dropout("0", high=1.0), "high < 1"),
        (lambda: hp.WeightDecay("0", low=0.0), "0 < low"),
        (lambda: HyperparameterSpace([]), "nothing to tune"),
        (lambda: fxstn.transform(mlp(), [hp.Dropout("2", init=0.99)]), r"2.dropout: init=0.99"),
        (lambda: fxstn.transform(mlp(), []), r"hparams=\[\] asks for nothing"),
        (lambda: fxstn.transform(mlp(), [hp.Dropout("sevn")]), r"'sevn' matches nothing.*nearest module names"),
        (lambda: fxstn.transform(SmallConv(), [hp.WeightDecay("bn1")]), r"'bn1' matches nothing.*'stem'"),
        (lambda: fxstn.transform(mlp(), [hp.Dropout("2"), hp.Dropout("*2*")]), "asked for twice at '2'"),
        (lambda: fxstn.transform(mlp(), [hp.WeightDecay("0"), hp.WeightDecay("0", shared=True)]), "asked for twice"),
        (lambda: fxstn.transform(mlp(), [hp.Scalar("a", 0.5, 0, 1)] * 2), "two hyperparameters are called 'a'"),
        (lambda: fxstn.transform(mlp(), method="best"), "method='best' is not one of delta, centered, stn"),
        (lambda: fxstn.transform(mlp(), trace="jit"), "trace='jit' is not one of auto, fx, export, live"),
        (lambda: fxstn.transform(mlp(), trace="export"), "trace='export' needs example_inputs"),
        (lambda: fxstn.transform(nn.Sequential(nn.ReLU()), [hp.Scalar("a", 0.5, 0, 1)]), "no parameter can respond"),
    ],
)
def test_a_bad_request_is_refused_with_name_value_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_print_as_they_were_written():
    assert repr(hp.Dropout("layer*", init=0.1)) == "hp.Dropout('layer*', init=0.1, low=0, high=0.95)"


@pytest.mark.parametrize("k", [0, 1, 4_321_098, 2**22, 2**23 - 2])
def test_an_integer_of_a_large_range_starts_where_it_is_put(k):
    assert HyperparameterSpace([Hyperparameter(k, 0, 2**23 - 1, integer=True, name="k")]).double().values() == {"k": k}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 39.0, 41.0, 1e5])
def test_sigma_starts_where_it_is_put_however_large(scale):
    space = HyperparameterSpace([Hyperparameter(0.5, 0.0, 1.0, scale, name="a")])
    assert space.scale.item() == pytest.approx(scale, rel=1e-6)


def test_numbers_of_numpy_are_taken_as_pythons():
    spec = hp.Dropout("2", init=np.float32(0.25), high=np.float64(0.75), scale=np.int64(2))
    stn = fxstn.transform(mlp(), [spec, hp.Scalar("a", np.float16(0.5), np.int64(0), np.int32(1))])
    (dropout, scalar) = stn.hparams.hyperparameters
    assert (dropout.init, dropout.high, dropout.scale, scalar.init) == (0.25, 0.75, 2, 0.5)
    assert {type(number) for number in (dropout.init, dropout.high, dropout.scale, scalar.low)} == {float, int}
    stn.hparams.set({"2.dropout": np.float32(0.5)})
    assert stn.hparams.values()["2.dropout"] == pytest.approx(0.5)
    loss = fxstn.general_loss(stn, lambda y, t: (0 * y.sum() + 8, np.int64(len(t))), torch.ones(4, 6), torch.zeros(4))
    assert loss.item() == 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("point", [-40.0, 40.0])
def test_values_are_inside_the_range_where_float32_rounds_beyond_an_end(log, point):
    """A schedule, or a refit, would refuse others. Float32 has no 0.1, 0.3 or 1e-7."""
    ranges = [(0.1, 0.3), (1e-7, 0.1), (0.3, 0.7), (0.7, 1.1)]
    space = HyperparameterSpace([Hyperparameter(low + 1e-3, low, high, log=log, name=f"{low}") for low, high in ranges])
    with torch.no_grad():
        space.unconstrained.fill_(point)
    values = space.values()
    for low, high in ranges:
        assert low <= values[f"{low}"] <= high
    space.set(values)


def test_strengths_of_a_lambda_that_rests_are_computed_once_and_never_stale():
    """Until λ moves, or somebody says that it may have; a copy has its own, and strengths at a perturbation are new."""
    space = HyperparameterSpace(SPACE)

    def strengths(own=space):
        with own.at_rest():
            assert own() is own()
            return own()

    first = strengths()
    assert strengths() is first
    assert torch.equal(first, space())
    twin = pickle.loads(pickle.dumps(space))
    for move in (
        lambda own: own.set({"rate": 0.5}),
        lambda own: own.load_state_dict({**own.state_dict(), "unconstrained": torch.ones(4)}),
        lambda own: (own.unconstrained.data.fill_(2.0), own.forget()),
        lambda own: own.double(),
    ):
        for own in (space, twin):
            move(own)
            assert torch.equal(strengths(own), own())
    with space.at_rest():
        assert not torch.equal(space(torch.ones(4)), space())
        for value in range(20):  # the memory of the last tensor is that of the next
            other = torch.full((4,), float(value))
            called = torch.func.functional_call(space, {"unconstrained": other}, ())
            assert torch.equal(called, space.bijection(other))
            del other


def test_rates_that_dropouts_keep_stay_with_the_strengths_until_these_change():
    p = torch.tensor([0.25, 0.5])
    assert keep_rates(p) is keep_rates(p)
    p[0] = 0.5
    assert keep_rates(p).tolist() == [0.5, 0.5]
