"""Regions in which a forward switches autocast off: graphs compute them, and their tangents, in full precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

import fxstn
from fxstn import hp

SCALAR = [hp.Scalar("unused", 0.5, 0.0, 1.0)]


class Net(nn.Module):
    """A trunk, and what `body` makes of its output.

    body: function of the module and of the trunk's output.
    """

    def __init__(self, body) -> None:
        super().__init__()
        self.trunk, self.layer, self.norm, self.head = (
            nn.Linear(6, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 3),
        )
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, F.relu(self.trunk(x)))


def head(s, h):
    with torch.autocast("cpu", enabled=False):
        return s.head(torch.tanh(s.norm(s.layer(h.float()))))


def middle(s, h):
    with torch.autocast("cpu", enabled=False):
        h = s.layer(h.float()).exp()
    return s.head(s.norm(h))


def softmax(s, h):
    h = s.layer(h)
    with torch.autocast("cpu", enabled=False):
        return F.softmax(s.head(h.float()), -1)


def of_cuda(s, h):
    """It changes nothing on a CPU."""
    with torch.autocast("cuda", enabled=False):
        return s.head(s.layer(h))


def nested(s, h):
    with torch.autocast("cuda", enabled=False):
        with torch.autocast("cpu", enabled=False):
            h = s.layer(h.float())
        return s.head(h)


def same_product_outside(s, h):
    wide = h.float()
    with torch.autocast("cpu", enabled=False):
        inside = s.layer(wide)
    return s.head(inside * s.layer(wide))


def own_device(s, h):
    with torch.autocast(h.device.type, enabled=False):
        h = s.layer(h.float()).exp()
    return s.head(h)


@torch.autocast("cpu", enabled=False)
def decorated(s, h):
    return s.head(torch.tanh(s.layer(h.float())))


BODIES = {function.__name__: function for function in (head, middle, softmax, of_cuda, nested, same_product_outside,
                                                       own_device, decorated)}  # fmt: skip
FOLLOWED = [
    (name, trace) for name in BODIES for trace in ("fx", "export", "live") if (name, trace) != ("own_device", "fx")
]


def shuffled(stn):
    """The network with other response parameters, whose U δ bfloat16 holds exactly for δ = ½."""
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape) / 16)
    return stn


def trained(module, x, autocast):
    """The output and the gradients of a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
        loss = F.cross_entropy(y, torch.arange(len(x)) % 3)
    loss.backward()
    return y, [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("body", "trace"), FOLLOWED)
def test_a_network_trains_as_its_model_does(body, trace, autocast):
    torch.manual_seed(0)
    model, x = Net(BODIES[body]), torch.randn(8, 6)
    stn = fxstn.transform(model, SCALAR, example_inputs=x, trace=trace).train()
    (own, own_gradients), (y, gradients) = (trained(module, x, autocast) for module in (model, stn))
    torch.testing.assert_close(y, own, rtol=0, atol=0)
    torch.testing.assert_close(gradients, own_gradients, rtol=0, atol=2e-3 if autocast else 1e-7)


def test_auto_leaves_a_region_whose_types_a_graph_fixes_to_the_forward_as_it_is():
    """torch.export writes the type of a value that autocast lowers as float32, which no product with a lowered one takes."""
    torch.manual_seed(0)

    def body(s, h):
        value = s.layer(h)
        with torch.autocast(h.device.type, enabled=False):
            wide = h.float()
            return s.head(wide * torch.bmm(wide.to(value.dtype)[:, None], value[:, :, None])[:, 0])

    model, x = Net(body), torch.randn(8, 6)
    stn = fxstn.transform(model, SCALAR, example_inputs=x).train()
    assert stn.frontend == "live"
    assert "under autocast" in str(stn.rejected[-1])
    (own, own_gradients), (y, gradients) = (trained(module, x, True) for module in (model, stn))
    torch.testing.assert_close(y, own, rtol=0, atol=0)
    torch.testing.assert_close(gradients, own_gradients, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rows", [(), (8,)], ids=["batch", "examples"])
@pytest.mark.parametrize(
    ("trace", "options"),
    [("fx", {}), ("fx", {"recompute": True}), ("fx", {"response": "structured"}), ("export", {}), ("live", {})],
)
def test_the_tangent_of_a_region_is_in_full_precision(trace, options, rows):
    """The trunk does not move, so that nothing of the tangent is rounded."""
    torch.manual_seed(0)
    model, x = Net(head), torch.randn(8, 6)
    model.trunk.requires_grad_(False)
    stn = shuffled(fxstn.transform(model, SCALAR, example_inputs=x, trace=trace, **options).eval())
    delta = torch.tensor([0.5])
    now, ahead = dict(stn.model.named_parameters()), stn.best_response(delta)
    with torch.autocast("cpu", torch.bfloat16):
        got = stn.perturbed_output(x, delta=delta.expand(*rows, 1) if rows else delta)[0]
        y, dy = jvp(lambda w: functional_call(model, w, x), (now,), ({name: ahead[name] - now[name] for name in now},))
    torch.testing.assert_close(got, y + dy, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(stn.output_at_rest(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["centered", "stn"])
def test_a_finite_step_in_a_region_is_in_full_precision(method):
    torch.manual_seed(0)
    model, x = Net(head), torch.randn(8, 6)
    model.trunk.requires_grad_(False)
    stn = shuffled(fxstn.transform(model, SCALAR, example_inputs=x, method=method).eval())
    delta = torch.tensor([0.5])
    with torch.autocast("cpu", torch.bfloat16):
        got = stn.perturbed_output(x, delta=delta)[0]
        expected = functional_call(model, stn.best_response(delta), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_tune_follows_such_a_model_by_a_graph_in_a_loop_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(Net(head), nn.Dropout(0.1), nn.Linear(3, 3))
    batches = [(torch.randn(8, 6), torch.arange(8) % 3)] * 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, batches, batches)
    for _ in range(3):
        for x, target in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert tuner.stn.frontend == "fx"
    assert len(tuner.history) > 1


def test_a_graph_switches_autocast_off_where_its_inputs_are():
    """A region that names the device of an input is one of whatever device the network is moved to."""
    stn = fxstn.transform(Net(own_device), SCALAR, example_inputs=torch.randn(8, 6), trace="export").to("meta")
    assert stn(torch.randn(5, 6, device="meta")).device.type == "meta"
