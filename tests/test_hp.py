"""Hyperparameters: bijections, perturbations, specs and what is wrong with them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SmallConv, mlp
from torch import nn

import fxstn
from fxstn import hp
from fxstn.hp import HyperparameterSpace, Quantity

SPACE = [
    Quantity("rate", 0.05, 0.0, 0.95),
    Quantity("decay", 1e-4, 1e-7, 1e-1, log=True),
    Quantity("any", 3.0, 0.0, math.inf),
    Quantity("holes", 1.5, 0.0, 5.0, integer=True),
]


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
        quantity = Quantity("q", init, low, high, log=log)
        space = HyperparameterSpace([quantity]).double()
        assert space.values()["q"] == pytest.approx(init, rel=1e-4)


def test_integers_are_floored_per_example():
    space = HyperparameterSpace([SPACE[3]])
    values = space(torch.tensor([[-9.0], [0.0], [0.6], [9.0]]))
    assert values.flatten().tolist() == [0.0, 1.0, 2.0, 4.0]


def test_samples_have_scale_sigma_and_carry_its_gradient():
    space = HyperparameterSpace([Quantity("a", 0.5, 0, 1, scale=0.3), Quantity("b", 0.5, 0, 1, scale=2.0)])
    samples = space.sample(20000)
    assert samples.shape == (20000, 2)
    torch.testing.assert_close(samples.std(0), torch.tensor([0.3, 2.0]), rtol=0.03, atol=0)
    samples.square().mean().backward()
    assert (space.raw_scale.grad > 0).all()


def test_entropy_is_that_of_a_gaussian():
    space = HyperparameterSpace([Quantity("a", 0.5, 0, 1, scale=0.3), Quantity("b", 0.5, 0, 1, scale=2.0)])
    expected = torch.distributions.Normal(0, torch.tensor([0.3, 2.0])).entropy().sum()
    torch.testing.assert_close(space.entropy(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantity("q", 2.0, 0.0, 1.0), r"q: init=2.0 is not strictly between low=0.0 and high=1.0"),
        (lambda: Quantity("q", 0.0, 0.0, 1.0), "not strictly between"),
        (lambda: Quantity("q", 0.5, 1.0, 1.0), "not below"),
        (lambda: Quantity("q", 0.5, 0.0, 1.0, scale=0.0), "scale=0.0"),
        (lambda: Quantity("q", 0.5, 0.0, 1.0, log=True), "low > 0"),
        (lambda: Quantity("q", 0.5, 0.1, math.inf), "low=0"),
        (lambda: hp.Dropout("0", high=1.0), "high < 1"),
        (lambda: hp.WeightDecay("0", low=0.0), "0 < low"),
        (lambda: HyperparameterSpace([]), "nothing to tune"),
        (lambda: fxstn.transform(mlp(), [hp.Dropout("2", init=0.99)]), r"2.dropout: init=0.99"),
        (lambda: fxstn.transform(mlp(), []), "nothing to tune"),
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
