"""Tensors of one entry or none, and reductions in another type: what torch gives, and the tangent of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.errors import operation_name
from fxstn.ir.tangents import ZERO
from fxstn.ops.noise import alpha_dropout_coefficients
from fxstn.rules import apply_rule
from tests.nets import randomize_response

NO_FREEDOM = pytest.mark.filterwarnings("ignore:.*degrees of freedom")
MOMENTS = (torch.var, torch.std, torch.var_mean, torch.std_mean)


def name(value):
    return operation_name(value) if callable(value) else ""


def both(function, x, dx, *args, **kwargs):
    """(y, dy) by the rule and by torch.func.jvp."""
    found = apply_rule(function, (dx,), (x, *args), kwargs)
    return found, torch.func.jvp(lambda v: function(v, *args, **kwargs), (x,), (dx,))


def same(found, expected):
    """Numbers and types that agree; no number agrees with none. Results of torch have types of their own."""
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (ours, theirs))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@NO_FREEDOM
@pytest.mark.parametrize("function", MOMENTS, ids=name)
@pytest.mark.parametrize(
    ("shape", "args", "settings"),
    [
        ((1, 3), (0,), {}),
        ((0, 3), (0,), {}),
        ((3, 0), (0,), {}),
        ((1, 3), (0,), {"correction": 0, "keepdim": True}),
        ((4, 3), (0,), {"correction": 5}),
        ((4, 3), (0,), {"correction": 0.5}),
        ((), (0,), {"correction": 0}),
    ],
)
def test_a_moment_of_few_values_is_torchs_number_or_none(function, shape, args, settings):
    x, dx = torch.randn(shape).double(), torch.randn(shape).double()
    same(*both(function, x, dx, *args, **settings))


@pytest.mark.parametrize(
    ("function", "shape", "args"),
    [
        *((torch.prod, (0, 3), args) for args in ((), (0,), (1, True))),
        (torch.prod, (3, 0), (0,)),
        (torch.cumprod, (0, 3), (0,)),
        *((F.group_norm, shape, (3,)) for shape in ((0, 6), (0, 6, 4), (0, 6, 2, 2))),
        (F.instance_norm, (0, 6, 4), ()),
    ],
    ids=name,
)
def test_a_tensor_of_no_entries_has_the_tangent_that_torch_gives_it(function, shape, args):
    x, dx = torch.randn(shape).double(), torch.randn(shape).double().requires_grad_()
    found, expected = both(function, x, dx, *args)
    same(found, expected)
    assert torch.autograd.grad(found[1].sum(), dx, allow_unused=True, materialize_grads=True)[0].shape == x.shape


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4)])
def test_batch_norm_of_an_empty_batch_is_empty(shape):
    x, dx, weight = torch.randn(shape), torch.randn(shape), torch.ones(3)
    y, dy = apply_rule(F.batch_norm, (dx, ZERO, ZERO, weight, weight), (x, None, None, weight, weight, True), {})
    assert y.shape == dy.shape == x.shape


class Spread(nn.Module):
    """A layer, and how far the examples of the batch are apart, which of one example is no number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.cat([h, h.std(0, keepdim=True).nan_to_num().expand_as(h)], 1))


@NO_FREEDOM
@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_last_batch_of_one_has_the_spread_that_the_network_gives_it(trace):
    """Its tangent is that of the number put in the place of none, as a central difference has it."""
    model, x = Spread().double(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    stn = fxstn.transform(model, [hp.WeightDecay()], example_inputs=x, trace=trace)
    randomize_response(stn)
    delta = torch.full((len(stn.hparams),), 0.1).double()
    y, dy = stn.pushforward(x[:1], delta=delta)
    at_rest = dict(model.named_parameters())
    moved = stn.best_response(delta)
    step = {key: moved[key] - value for key, value in at_rest.items()}
    ends = [
        torch.func.functional_call(model, {key: value + sign * step[key] for key, value in at_rest.items()}, (x[:1],))
        for sign in (1e-6, -1e-6)
    ]
    torch.testing.assert_close(y, model(x[:1]))
    torch.testing.assert_close(dy, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
    assert stn.perturbed_output(x[:1], delta=delta)[0].isfinite().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "args"),
    [
        *((f, args) for f in (torch.prod, torch.sum, torch.mean, torch.nansum) for args in ((), (1,))),
        *((f, (1,)) for f in (torch.cumprod, torch.cumsum, torch.softmax, torch.log_softmax, F.softmin)),
        *((torch.linalg.vector_norm, (p, 1)) for p in (1, 2, 3.0, math.inf)),
        (torch.norm, (2, 1)),
        (torch.linalg.norm, (None, 1)),
        (torch.linalg.matrix_norm, ()),
    ],
    ids=name,
)
def test_a_reduction_in_another_type_has_its_tangent_in_that_type(function, args, kind):
    """What it gives of the values and of the directions in that type. torch.func.jvp has the type of the values."""
    other = torch.float64 if kind is torch.float32 else torch.float32
    if other is torch.float32 and function in (
        torch.norm,
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.linalg.matrix_norm,
    ):
        other = kind  # torch narrows no norm
    x, dx = torch.randn(3, 4).to(kind), torch.randn(3, 4).to(kind)
    found = apply_rule(function, (dx,), (x, *args), {"dtype": other})
    same(found, apply_rule(function, (dx.to(other),), (x.to(other), *args), {}))
    assert {value.dtype for value in found} == {other}


@pytest.mark.parametrize("p", [0.0, 0.5, 1 - 2**-53, 1.0])
def test_alpha_dropout_of_everything_is_zero(p):
    x = torch.randn(50).double()
    multiplier, shift = alpha_dropout_coefficients(x, p)
    assert (x * multiplier + shift).isfinite().all()
    if p == 1:
        torch.testing.assert_close(x * multiplier + shift, F.alpha_dropout(x, p, True))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.stft(h, 6, 2, window=torch.ones_like(h[0, :6]), return_complex=True).abs(),
        *(
            lambda h, mode=mode: torch.cdist(h, h[:2] + 1, compute_mode=f"{mode}use_mm_for_euclid_dist")
            for mode in ("", "donot_")
        ),
        lambda h: torch.atleast_3d(h),
    ],
    ids=["stft", "cdist", "cdist without products", "atleast_3d"],
)
def test_an_exported_graph_has_tangents_of_what_aten_spells_in_its_own_way(function):
    model = WithLayer(function).double()
    x = torch.randn(4, 4).double()
    stn = fxstn.transform(model, [hp.WeightDecay()], example_inputs=x, trace="export")
    plain = fxstn.transform(model, [hp.WeightDecay()], example_inputs=x, trace="live")
    for network in (stn, plain):
        torch.manual_seed(2)
        randomize_response(network)
    delta = torch.full((len(stn.hparams),), 0.1).double()
    torch.testing.assert_close(stn.pushforward(x, delta=delta), plain.pushforward(x, delta=delta))


class WithLayer(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 12), function

    def forward(self, x):
        return self.function(self.layer(x))
