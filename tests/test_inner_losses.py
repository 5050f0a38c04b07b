"""A loss that the forward computes itself is linearised before it, as one computed outside is; its minimum in Θ is finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.generators import forked_rng
from tests.nets import randomize_response


def one_hot(y):
    return F.one_hot(y, 3).double()


def smooth(o, y):
    return F.cross_entropy(o.reshape(-1, 3), y.reshape(-1), label_smoothing=0.1, ignore_index=1)


def in_place(o, y):
    loss = o.new_zeros(())
    loss += F.cross_entropy(o, y)
    return loss.add_(0.1 * o.square().mean())


# What a forward may compute of its logits and the target, as text models do.
LOSSES = {
    "cross entropy": F.cross_entropy,
    "module": lambda o, y: nn.CrossEntropyLoss()(o.view(-1, 3), y.view(-1)),
    "smoothed": smooth,
    "weighted": lambda o, y: F.cross_entropy(o, y, weight=o.new_tensor([1.0, 2.0, 3.0])),
    "log-likelihood": lambda o, y: F.nll_loss(F.log_softmax(o, -1), y),
    "by hand": lambda o, y: -F.log_softmax(o, -1).gather(1, y[:, None]).mean(),
    "squares": lambda o, y: F.mse_loss(o, one_hot(y)),
    "squares by hand": lambda o, y: ((o - one_hot(y)) ** 2).mean(),
    "squares by row": lambda o, y: F.mse_loss(o, one_hot(y), reduction="none").sum(1),
    "absolute": lambda o, y: F.l1_loss(o, target=one_hot(y)),
    "smooth absolute": lambda o, y: F.smooth_l1_loss(o, one_hot(y), beta=0.5) + F.huber_loss(o, one_hot(y), delta=0.5),
    "binary": lambda o, y: F.binary_cross_entropy(torch.sigmoid(o), one_hot(y)),
    "binary logits": lambda o, y: F.binary_cross_entropy_with_logits(o, one_hot(y)),
    "divergence": lambda o, y: F.kl_div(F.log_softmax(o, -1), (one_hot(y) + 0.1) / 1.3, reduction="batchmean"),
    "margin": F.multi_margin_loss,
    "several": lambda o, y: 0.7 * F.cross_entropy(o, y) + F.mse_loss(o, one_hot(y)) / 3,
    "penalty": lambda o, y: F.cross_entropy(o, y) + 0.1 * (o**2).mean(),
    "in place": in_place,
}


class Net(nn.Module):
    """Returns an object with losses, and with the logits where asked, as models of transformers do."""

    def __init__(self, logits):
        super().__init__()
        self.a, self.dropout, self.b, self.logits = nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3), logits

    def forward(self, x, y):
        h = torch.relu(self.a(x))
        o = self.b(self.dropout(h))
        losses = {name: loss(o, y) for name, loss in LOSSES.items()}
        activity = F.cross_entropy(o, y) + (h**2).mean()
        return SimpleNamespace(losses=losses, activity=activity, logits=o if self.logits else None)


X, Y = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(9) % 3


def network(trace, logits=True):
    torch.manual_seed(0)
    stn = fxstn.transform(Net(logits).double(), [hp.Dropout("dropout")], trace=trace, example_inputs=(X, Y))
    torch.manual_seed(0)
    randomize_response(stn, 2.0)
    return stn


@pytest.fixture(scope="module")
def outer():
    return network("fx")


@pytest.fixture(scope="module", params=[("fx", True), ("fx", False), ("export", True), ("live", True), ("live", False)],
                ids=["fx", "fx without logits", "export", "live", "live without logits"])  # fmt: skip
def inner(request):
    return network(*request.param)


def results(stn, loss_fn):
    """Values and gradients of the response and the hyper loss."""
    epsilon, values = torch.tensor([0.7]).double(), []
    for objective, parameters in (
        (fxstn.response_loss, list(stn.response_parameters())),
        (fxstn.hyper_loss, [stn.hparams.unconstrained]),
    ):
        with forked_rng():
            loss = objective(stn, loss_fn, (X, Y), Y, perturb=epsilon)
        values += [loss, *torch.autograd.grad(loss, parameters)]
    return values


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_the_forward_is_linearised_as_one_outside_is(name, inner, outer):
    inside = results(inner, lambda o, y: o.losses[name].mean())
    outside = results(outer, lambda o, y: LOSSES[name](o.logits, y).mean())
    torch.testing.assert_close(inside, outside, rtol=1e-10, atol=1e-12)


def test_a_loss_with_a_penalty_on_activations_has_a_minimum_in_the_response(inner):
    """It is convex in Θ; a response a hundred times too large costs more, however it points."""
    parameters = list(inner.response_parameters())
    values = []
    for factor in (1.0, 100.0, -100.0):
        with torch.no_grad():
            torch._foreach_mul_(parameters, factor)
            with forked_rng():
                values.append(
                    fxstn.response_loss(inner, lambda o, y: o.activity, (X, Y), Y, perturb=torch.ones(1).double())
                )
            torch._foreach_div_(parameters, factor)
    assert min(values[1:]) > 10 * values[0]
