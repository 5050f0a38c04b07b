"""Copies of Θ: each learned from its own examples, and λ moves as far as they agree."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import SmallConv, mlp, randomize_response
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.optimizers import SettlingAdam
from fxstn.bilevel.problem import NetworkProblem

SPECS = [hp.Dropout(), hp.WeightDecay(shared=True)]


def network(copies, model=None):
    torch.manual_seed(0)
    stn = fxstn.transform((model or mlp()).double(), SPECS, copies=copies).train()
    randomize_response(stn, 0.1)
    return stn


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))


def blocks(stn, of):
    """(copies, …): of each U, or of its gradient, the columns of each copy."""
    columns = [of(p).unflatten(1, (stn.copies, -1)).movedim(1, 0).flatten(1) for p in stn.response_parameters()]
    return torch.cat(columns, 1)


def test_a_copy_learns_from_its_own_examples_alone():
    stn = network(2)
    x, target = batch()
    epsilon = 0.5 * torch.randn(8, len(stn.hparams), dtype=torch.float64)
    others, moved = target.clone(), epsilon.clone()
    others[1::2] = (target[1::2] + 1) % 3
    moved[1::2] += 0.3
    found = []
    for labels, perturb in ((target, epsilon), (others, epsilon), (target, moved)):
        stn.zero_grad()
        torch.manual_seed(2)
        fxstn.response_loss(stn, F.cross_entropy, x, labels, perturb=perturb).backward()
        found.append(blocks(stn, lambda p: p.grad))
    for other in found[1:]:
        alike = [torch.allclose(a, b, rtol=1e-9) for a, b in zip(found[0], other, strict=True)]
        assert sorted(alike) == [False, True]


def test_every_copy_learns_from_batches_smaller_than_their_number():
    stn = fxstn.transform(mlp().double(), [hp.Dropout()], copies=4).train()
    x, target = batch()
    learned = torch.zeros(4, dtype=torch.bool)
    for _ in range(60):
        stn.zero_grad()
        fxstn.response_loss(stn, F.cross_entropy, x[:1], target[:1]).backward()
        now = blocks(stn, lambda p: p.grad).abs().sum(1) > 0
        assert now.sum() == 1
        learned |= now
    assert learned.all()


def test_the_response_is_the_mean_of_the_copies():
    stn, single = network(3), network(1)
    with torch.no_grad():
        for p, mean in zip(stn.response_parameters(), single.response_parameters(), strict=True):
            mean.copy_(p.unflatten(1, (3, -1)).mean(1))
    x, target = batch()
    delta = torch.randn(len(stn.hparams), dtype=torch.float64)
    for ours, expected in zip(stn.best_response(delta).values(), single.best_response(delta).values(), strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(stn.eval().pushforward(x, delta=delta), single.eval().pushforward(x, delta=delta))
    for each in (stn.train(), single.train()):
        torch.manual_seed(3)
        fxstn.general_loss(each, F.cross_entropy, x, target).backward()
        fxstn.hyper_loss(each, F.cross_entropy, x, target, perturb="none").backward()
    torch.testing.assert_close(stn.hypergradient(), single.hypergradient())
    assert not stn.hypergradient().requires_grad  # or it would keep the gradients of w₀ until the hyper step
    torch.testing.assert_close(stn.hparams.unconstrained.grad, single.hparams.unconstrained.grad)


def test_estimates_are_derivatives_of_the_validation_loss_along_each_copy():
    """Witness: the original network, weights moved by hand along one copy, central differences in float64."""
    stn = network(2)
    x, target = batch()
    problem = NetworkProblem(
        stn, F.cross_entropy, None, initial_state=None, entropy_weight=0.0, tune_scale=False, perturb=None,
        response_fraction=1.0, response_widening=1.0, response_windows=1, hyper_fraction=1.0,
    )  # fmt: skip
    problem.hyper_loss(x, target).backward()
    estimates = problem.estimates()
    torch.testing.assert_close(estimates.mean(0), stn.hparams.unconstrained.grad)
    plain, weights = copy.deepcopy(stn.model).eval(), dict(stn.model.named_parameters())
    for k in range(2):
        for j in range(len(stn.hparams)):
            losses = []
            for step in (1e-5, -1e-5):
                moved = {}
                for name, w in weights.items():
                    scales = stn.response.get_submodule(name).U[:, k * len(stn.hparams) + j]
                    moved[name] = w * (1 + step * scales).view(-1, *[1] * (w.dim() - 1))
                losses.append(F.cross_entropy(functional_call(plain, moved, x), target))
            torch.testing.assert_close(estimates[k, j], (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def moved(draw, steps=100, numbers=20, certainty=2.0):
    """Root mean square of what x moves in so many steps of estimates."""
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(numbers))
    optimizer = SettlingAdam([x], lr=0.1, certainty=certainty)
    for _ in range(steps):
        x.estimates = draw()
        x.grad = x.estimates.mean(0)
        optimizer.step()
    return x.detach().square().mean().sqrt().item()


def test_lambda_moves_where_copies_agree_and_not_where_they_do_not():
    signal, error = torch.ones(20), torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    agreed = moved(lambda: signal + 0.1 * torch.randn(4, 20))
    as_adam = moved(lambda: signal + 0.1 * torch.randn(4, 20), certainty=None)
    assert agreed > 0.95 * as_adam
    assert moved(lambda: error) < 0.5 * moved(lambda: error, certainty=None)  # an error that stays
    assert moved(lambda: torch.zeros(4, 20)) == 0
    veto = torch.zeros(4, 20)
    veto[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # their mean is zero, and one number speaks for no other
    assert moved(lambda: signal.scatter(0, torch.tensor([0]), 0.0) + veto + 0.1 * torch.randn(4, 20)) > 0.8 * as_adam


def run(stn, **settings):
    x, target = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
    loader = DataLoader(TensorDataset(x, target), 8)
    return fxstn.BilevelRunner(
        stn, F.cross_entropy, loader, loader, train_steps=1, response_every=1, progress=False, **settings
    )


def test_a_run_resumes_to_the_same_end(tmp_path):
    ends = []
    for pauses in ([4], [2, 4]):
        stn, out = network(2), tmp_path / str(len(pauses))
        for epochs in pauses:
            stn = network(2)
            torch.manual_seed(5)
            run(stn, out_dir=out).fit(epochs)
        ends.append(stn.state_dict())
    assert any(not torch.equal(value, network(2).state_dict()[name]) for name, value in ends[0].items())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_norms_and_convolutions_have_copies_too():
    stn = fxstn.transform(SmallConv(), SPECS, copies=2).train()
    x, target = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    fxstn.response_loss(stn, F.cross_entropy, x, target).backward()
    assert all(blocks(stn, lambda p: p.grad).abs().sum(1) > 0)


@pytest.mark.parametrize("wrong", [{"copies": 0}, {"copies": 1.5}, {"copies": 2, "response": "structured"},
                                   {"copies": 2, "method": "centered"}, {"copies": 2, "trace": "live"}])  # fmt: skip
def test_where_there_can_be_no_copies(wrong):
    with pytest.raises(ValueError, match="copies="):
        fxstn.transform(mlp(), SPECS, example_inputs=torch.randn(2, 6), **wrong)


def test_copies_need_an_epsilon_per_example():
    with pytest.raises(ValueError, match="ε per example"):
        run(network(2), perturb="batch").fit(1)
    with pytest.raises(ValueError, match="ε per example"):
        fxstn.response_loss(network(2), F.cross_entropy, *batch(), perturb="batch")
