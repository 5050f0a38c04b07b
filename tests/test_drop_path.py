"""Stochastic depth under other names is tuned; what a model draws itself is told by explain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxstn


class DropPath(nn.Module):
    """As in timm: one draw per row, by bernoulli_."""

    def __init__(self, drop_prob, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep) if self.scale_by_keep else x * mask


class Floored(nn.Module):
    """As in transformers: one draw per row, by rand and floor."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.rate
        return x.div(keep) * (keep + torch.rand(x.shape[0], *[1] * (x.dim() - 1))).floor()


class Noise(nn.Module):
    """By entry, and never off: no stochastic depth."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x, 1 - self.p)) / (1 - self.p)


def net(module):
    return nn.Sequential(nn.Linear(6, 8), module, nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("module", [DropPath(0.2), Floored(0.2)], ids=["bernoulli", "floor"])
def test_stochastic_depth_of_any_class_is_tuned(module):
    stn = fxstn.transform(net(module)).train()
    assert stn.hparams.values() == pytest.approx({"1.stochastic_depth": 0.2})
    stn.hparams.set({"1.stochastic_depth": 0.75})
    stn.model[0].bias.data.fill_(3.0)
    dropped = torch.isclose(stn(torch.zeros(4000, 6)), stn.model[3].bias).all(1).double().mean()
    assert float(dropped) == pytest.approx(0.75, abs=0.03)


def test_the_tangent_through_it_is_exact():
    assert fxstn.verify(net(DropPath(0.2)), torch.randn(4, 6)).ok


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
@pytest.mark.parametrize("module", [DropPath(0.2, scale_by_keep=False), Noise(0.2)], ids=["unscaled", "by entry"])
def test_what_the_model_draws_itself_is_told(module, trace):
    x = torch.randn(4, 6)
    stn = fxstn.transform(net(module), trace=trace, example_inputs=x).train()
    assert not any("stochastic_depth" in name for name in stn.hparams.names)
    rows = [row for row in fxstn.explain(stn, example_inputs=x).rows if row.rule == "fixed noise"]
    assert [(row.module, row.became) for row in rows] == [("1", "kept as the model draws it, not tuned")]


class Scaled(nn.Module):
    """Hands its input through, and has a large number: no side of blocks, to be tried on feature maps of 300 GB."""

    def __init__(self):
        super().__init__()
        self.scale, self.temperature = 1.0, 10_000

    def forward(self, x):
        return x


def test_a_large_number_of_a_module_is_no_side_of_blocks():
    stn = fxstn.transform(nn.Sequential(nn.Linear(6, 8), Scaled(), nn.Dropout(0.2), nn.Linear(8, 3)))
    assert list(stn.hparams.names) == ["2.dropout"]
