"""Which weights respond, of those that could: counted in one way, shown everywhere, and warned of where they are few."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.coverage import Weight

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class Mixed(nn.Module):
    """A layer, and a large weight that a function of Python's reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.unread = nn.Linear(4, 4), nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(4, width))

    def forward(self, x):
        return self.layer(x).sum(1) + torch.pdist(self.weight).sum()


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_weights_before_a_norm_are_named_and_not_lost():
    scaled, structured = (
        fxstn.transform(Normed(), SCALAR, response=kind).coverage for kind in ("scaled", "structured")
    )
    assert [weight.name for weight in scaled.omitted] == ["0.weight"]
    assert (scaled.responding, scaled.possible, scaled.share, scaled.lost) == (1, 1, 1.0, ())
    assert (structured.responding, structured.possible, structured.responding_elements) == (2, 2, 48)
    left_out = "1 is left out on purpose (32 elements): a batch norm after it takes its scale away"
    assert str(scaled) == f"1 of 2 weights responds, 16 of 48 elements; {left_out}"
    assert str(structured) == "2 of 2 weights respond, 100.0% of their elements"
    both = replace(scaled, possible=2, possible_elements=21, lost=(Weight("2.weight", 5, "why"),))
    assert str(both) == f"1 of 3 weights responds, 16 of 53 elements; 1 could and does not (5 elements); {left_out}"


def test_less_than_half_is_warned_of_with_the_largest_and_the_reason():
    with pytest.warns(
        UserWarning, match=r"1 of 2 weights responds, 28\.6% of their elements.*'weight' \(40 elements\): "
    ):
        stn = fxstn.transform(Mixed(10), SCALAR)
    assert [weight.name for weight in stn.coverage.lost] == ["weight"]
    assert copy.deepcopy(stn).coverage == stn.coverage
    assert str(stn.coverage) in stn.summary()
    assert str(stn.coverage) in str(fxstn.explain(stn))


def test_more_than_half_is_shown_and_not_warned_of():
    explanation = fxstn.explain(net := Mixed(2), SCALAR)
    assert explanation.coverage == fxstn.transform(net, SCALAR).coverage
    assert re.search(r"1 of 2 weights responds, 66\.7% of their elements", str(explanation))
    result = fxstn.verify(net, torch.randn(3, 4), hparams=SCALAR)
    assert str(result.coverage) in str(result)


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x + torch.pdist(self.weight).sum()


def test_the_error_that_nothing_can_respond_names_what_stands_in_the_way():
    with pytest.raises(ValueError, match=r"no parameter can respond.*the largest are 'weight': .*pdist"):
        fxstn.transform(Nothing(), SCALAR)


def test_a_pattern_in_a_model_without_such_modules_does_not_speak_of_names():
    with pytest.raises(ValueError, match="the model has none of these") as caught:
        fxstn.transform(nn.Sequential(nn.Linear(2, 2)), [hp.StochasticDepth("layer*")])
    assert "nearest" not in str(caught.value)
