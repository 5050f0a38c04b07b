"""Options that change what a step costs: what they compute is the same, or what their docstrings say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fxstn
from benchmarks.overhead import NETWORKS
from fxstn import hp
from fxstn.passes.recompute import Recomputed
from fxstn.tools.models import build_model
from tests.nets import SmallConv, mlp, randomize_response

HPARAMS = [hp.Dropout("bn1", init=0.3), hp.WeightDecay()]


@pytest.fixture
def batch():
    return torch.randn(8, 3, 8, 8), torch.randint(5, (8,))


def made(model=None, **settings):
    torch.manual_seed(0)
    stn = fxstn.transform(model or SmallConv(), HPARAMS, **settings).train()
    randomize_response(stn)
    return stn


def losses_and_gradients(stn, batch):
    torch.manual_seed(1)
    losses = [f(stn, F.cross_entropy, *batch) for f in (fxstn.response_loss, fxstn.hyper_loss)]
    sum(losses).backward()
    return losses, {name: p.grad for name, p in stn.named_parameters() if p.grad is not None}


# Activation checkpointing


def test_recomputing_activations_changes_no_bit(batch):
    networks = [made(recompute=recompute) for recompute in (False, True)]
    (losses, gradients), (other_losses, other_gradients) = (losses_and_gradients(stn, batch) for stn in networks)
    torch.testing.assert_close(other_losses, losses, rtol=0, atol=0)
    torch.testing.assert_close(other_gradients, gradients, rtol=0, atol=0)
    assert not any(name.startswith("model.") for name in gradients)
    plain, pieces = (list(stn.graph("linearized").modules()) for stn in networks)
    assert not any(isinstance(module, Recomputed) for module in plain)
    assert sum(isinstance(module, Recomputed) for module in pieces) >= 4


def test_recomputing_networks_are_copied_saved_and_moved(batch):
    stn = made(recompute=True)
    expected = losses_and_gradients(stn, batch)[0]
    for twin in (copy.deepcopy(stn), pickle.loads(pickle.dumps(stn))):
        torch.testing.assert_close(losses_and_gradients(twin, batch)[0], expected)
    double = stn.double()
    assert losses_and_gradients(double, (batch[0].double(), batch[1]))[0][0].dtype == torch.float64


# Statistics of batch norms in the response step


def test_running_statistics_in_the_response_step_are_those_of_a_frozen_batch_norm(batch):
    torch.manual_seed(3)
    model = SmallConv()
    model(torch.randn(16, 3, 8, 8))  # statistics that are not their start
    frozen = copy.deepcopy(model).train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    running, witness = (
        made(m, response="structured", statistics=s) for m, s in ((model, "running"), (frozen, "batch"))
    )
    (losses, gradients), (expected, expected_gradients) = (losses_and_gradients(s, batch) for s in (running, witness))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    other, _ = losses_and_gradients(made(model, response="structured"), batch)
    assert abs(other[0] - losses[0]) > 1e-4 * losses[0]
    assert abs(other[1] - losses[1]) > 1e-4 * losses[1]


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_in_the_hyper_step_batch_norms_normalise_by_the_batch_but_those_that_are_frozen(batch, trace):
    model = SmallConv().train()
    model.bn2.eval()
    stn = fxstn.transform(model, [hp.Scalar("a", 0.5, 0, 1)], trace=trace, example_inputs=batch[0])
    before = copy.deepcopy(stn.model.state_dict())
    found = fxstn.hyper_loss(stn, F.cross_entropy, *batch, entropy_weight=0.0, perturb="off")
    torch.testing.assert_close(stn.model.state_dict(), before)
    model.eval().bn1.train()
    torch.testing.assert_close(found, F.cross_entropy(model(batch[0]), batch[1]))


def test_with_running_statistics_examples_do_not_see_each_other(batch):
    stn = made(statistics="running")
    delta = stn.hparams.sample(8).detach()

    def output(x):
        torch.manual_seed(0)
        return stn.perturbed_output(x, delta=delta, condition=delta)[0]

    changed = batch[0].clone()
    changed[0] += 1
    torch.testing.assert_close(output(changed)[1:], output(batch[0])[1:])


@pytest.mark.parametrize("settings", [{"recompute": True}, {"statistics": "running"}], ids=str)
def test_options_of_delta_are_refused_for_other_methods(settings):
    with pytest.raises(ValueError, match="is for method 'delta'"):
        fxstn.transform(mlp(), method="stn", **settings)
    with pytest.raises(ValueError, match=r"is for method 'delta'.*'live'"):
        fxstn.transform(mlp(), trace="live", example_inputs=torch.randn(2, 6), **settings)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="statistics='frozen' is not one of batch, running"):
        fxstn.transform(mlp(), statistics="frozen")


# torch.compile


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_compiled_graphs_have_no_break_and_give_the_same_numbers(batch, recompute):
    stn = made(recompute=recompute)
    twin = copy.deepcopy(stn)
    twin.compile(backend="aot_eager")  # fullgraph=True: a break raises
    for part in (slice(None), slice(4))[: 1 if recompute else 2]:  # another batch size is compiled too
        some = batch[0][part], batch[1][part]
        expected, found = (losses_and_gradients(s, some) for s in (stn, twin))
        torch.testing.assert_close(found, expected)
        torch.manual_seed(5)
        expected = fxstn.general_loss(stn, F.cross_entropy, *some)
        torch.manual_seed(5)
        found = fxstn.general_loss(twin, F.cross_entropy, *some)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(stn.named_buffers()))
        stn.zero_grad(), twin.zero_grad()
    assert pickle.loads(pickle.dumps(twin))._graphs.compile_options == {"fullgraph": True, "backend": "aot_eager"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", NETWORKS)
@torch._inductor.config.patch(fallback_random=True)  # the draws of eager mode
def test_the_benchmark_networks_compile_and_give_the_same_numbers(name):
    network, _, image = NETWORKS[name]
    torch.manual_seed(0)
    stn = fxstn.transform(build_model(network, 10)).train().double()  # batch norm of 4 values magnifies rounding
    randomize_response(stn, 0.01)
    batch = torch.randn(4, 3, image, image).double(), torch.randint(10, (4,))
    twin = copy.deepcopy(stn)
    twin.compile()
    for loss in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        results = []
        for network in (stn, twin):
            torch.manual_seed(1)
            value = loss(network, F.cross_entropy, *batch)
            value.backward()
            results.append((value.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}))
            network.zero_grad()
        (expected, gradients), (found, other) = results
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert gradients.keys() == other.keys()
        for key, gradient in gradients.items():
            assert (other[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, key


def test_what_runs_as_it_is_cannot_be_compiled():
    stn = fxstn.transform(mlp(), trace="live", example_inputs=torch.randn(2, 6))
    with pytest.raises(ValueError, match="has no graph to be compiled"):
        stn.compile()


# Low precision


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_law_1_under_bfloat16_autocast(training):
    torch.manual_seed(0)
    model = SmallConv()
    stn = fxstn.transform(model, [hp.WeightDecay(shared=True)]).train(training)
    randomize_response(stn)
    x, delta = torch.randn(16, 3, 16, 16), torch.tensor([1.0])
    with torch.autocast("cpu", torch.bfloat16):
        _, dy = stn.pushforward(x, delta=delta)
    assert dy.dtype == torch.bfloat16
    stn, original, step = stn.double(), copy.deepcopy(model).double().train(training), 1e-5

    def moved(length):
        weights = stn.best_response(length * delta.double())
        return functional_call(original, weights | {n: b.clone() for n, b in original.named_buffers()}, (x.double(),))

    expected = (moved(step) - moved(-step)) / (2 * step)
    assert (dy.double() - expected).norm() <= 8 * 2**-8 * expected.norm()  # a few roundings to 8 bits in a row
