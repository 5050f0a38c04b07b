"""Laws 3 and 4: which objective reaches which parameters, what it is equal to, and that noise is shared."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fxstn
from benchmarks.fake_cuda import fake_cuda
from benchmarks.launches import Launches
from fxstn import hp
from fxstn.bilevel import losses
from fxstn.frontends.inputs import Inputs
from fxstn.ops import noise
from fxstn.ops.noise import alpha_dropout_coefficients, by_example, dropout_mask, keep_rates
from fxstn.tools.reference import ReferenceRun, strengths_of
from tests.nets import Classifier, SmallConv, mlp, randomize_response


def grads(parameters):
    return [parameter.grad is not None for parameter in parameters]


@pytest.fixture
def batch():
    return torch.randn(8, 3, 8, 8), torch.randint(5, (8,))


@pytest.fixture
def stn():
    network = fxstn.transform(SmallConv(), [hp.Dropout(), hp.WeightDecay()]).train()
    randomize_response(network)
    return network


@pytest.mark.parametrize("method", ["delta", "centered"])
def test_each_step_leaves_gradients_on_its_own_parameters_only(batch, method):
    stn = fxstn.transform(SmallConv(), [hp.Dropout(), hp.WeightDecay()], method=method)
    randomize_response(stn)
    responding = list(stn.response_parameters())
    fxstn.general_loss(stn, F.cross_entropy, *batch).backward()
    assert all(grads(stn.general_parameters()))
    assert not any(grads([*responding, *stn.hparams.parameters()]))
    stn.zero_grad()
    fxstn.response_loss(stn, F.cross_entropy, *batch).backward()
    assert all(grads(responding))
    assert not any(grads([*stn.general_parameters(), *stn.hparams.parameters()]))
    stn.zero_grad()
    fxstn.hyper_loss(stn, F.cross_entropy, *batch).backward()
    assert all(grads(stn.hparams.parameters()))
    assert not any(grads([*stn.general_parameters(), *responding]))
    assert all(p.requires_grad for p in stn.parameters())


def test_the_stn_method_trains_weights_and_response_on_one_objective(batch):
    stn = fxstn.transform(SmallConv(), [hp.Dropout(), hp.WeightDecay()], method="stn")
    fxstn.general_loss(stn, F.cross_entropy, *batch).backward()
    assert all(grads([*stn.general_parameters(), *stn.response_parameters()]))
    assert not any(grads(stn.hparams.parameters()))
    stn.zero_grad()
    fxstn.hyper_loss(stn, F.cross_entropy, *batch).backward()
    assert all(grads(stn.hparams.parameters()))
    assert not any(grads([*stn.general_parameters(), *stn.response_parameters()]))


def test_only_the_general_step_updates_running_statistics(stn, batch):
    before = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    fxstn.response_loss(stn, F.cross_entropy, *batch)
    fxstn.hyper_loss(stn, F.cross_entropy, *batch)
    stn.pushforward(batch[0], delta=torch.zeros(len(stn.hparams)))
    for name, buffer in stn.model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    fxstn.general_loss(stn, F.cross_entropy, *batch)
    assert not torch.equal(stn.model.bn1.running_mean, before["bn1.running_mean"])
    assert stn.model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_train_mode_trains_exactly_like_the_original(momentum):
    net = SmallConv().train()
    net.bn1.momentum = momentum
    net.bn2.eval()  # frozen by hand
    stn = fxstn.transform(net, [hp.WeightDecay()])
    x, target = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    for _ in range(2):
        a, b = F.cross_entropy(net(x), target), F.cross_entropy(stn(x), target)
        assert torch.equal(a, b)
        a.backward()
        b.backward()
    for (name, p), q in zip(net.named_parameters(), stn.general_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(net.named_buffers(), stn.model.buffers(), strict=True):
        assert torch.equal(p, q), name


def test_train_mode_equals_the_original_under_the_same_draws():
    for net, x in ((mlp(0.3), torch.randn(5, 6)), (Classifier(), torch.randn(5, 1, 9, 9))):
        net.train()
        stn = fxstn.transform(net)
        torch.manual_seed(3)
        y = stn(x)
        torch.manual_seed(3)
        expected = ReferenceRun(net, strengths_of(stn, training=True), stn.hparams().detach()).output(Inputs((x,), {}))
        torch.testing.assert_close(y, expected)


def test_eval_mode_is_the_plain_network_bit_for_bit():
    net = SmallConv()
    for parameter in net.parameters():
        parameter.data.normal_()  # weights of one's own survive
    stn = fxstn.transform(net).eval()
    x = torch.randn(4, 3, 8, 8)
    net.eval()
    assert torch.equal(stn(x), net(x))
    assert torch.equal(stn.graph("eval")(x), net(x))


def test_transform_leaves_the_model_alone():
    net = SmallConv().train()
    net.bn2.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    fxstn.transform(net, example_inputs=torch.randn(4, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]


def test_the_exported_model_loads_strictly_and_predicts_alike(stn, batch):
    plain = stn.export()
    assert type(plain) is SmallConv
    fresh = SmallConv()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(batch[0]), stn.eval()(batch[0]))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_share_nothing_and_compute_the_same(stn, batch, copy_of):
    twin = copy_of(stn)
    delta = torch.randn(8, len(stn.hparams))
    torch.manual_seed(1)
    expected = stn.pushforward(batch[0], delta=delta, condition=delta)
    torch.manual_seed(1)
    found = twin.pushforward(batch[0], delta=delta, condition=delta)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        for parameter in stn.parameters():
            parameter.zero_()
    assert twin(batch[0]).abs().sum() > 0


def test_moving_and_loading_reach_every_graph(stn, batch):
    twin = fxstn.transform(SmallConv(), [hp.Dropout(), hp.WeightDecay()])
    twin.load_state_dict(stn.state_dict())
    twin.double()
    delta = torch.randn(8, len(stn.hparams))
    stn.eval(), twin.eval()
    found = twin.pushforward(batch[0].double(), delta=delta.double())[1]
    torch.testing.assert_close(found.float(), stn.pushforward(batch[0], delta=delta)[1], rtol=1e-3, atol=1e-4)


def test_primal_and_tangent_share_one_draw():
    """In a linear network with input dropout, dy is the response applied to the very input that y saw."""
    net = nn.Sequential(nn.Linear(50, 1, bias=False)).double()
    stn = fxstn.transform(net, [hp.Dropout("input", init=0.5)], response="structured").train()
    randomize_response(stn)
    response = stn.response.get_submodule("0.weight")
    with torch.no_grad():
        response.R.copy_(net[0].weight)
    y, dy = stn.pushforward(torch.randn(64, 50).double(), delta=torch.ones(1).double())
    torch.testing.assert_close(dy, y * response.U.squeeze())


@pytest.mark.parametrize("graph", ["train", "pushforward", "linearized", "perturbed"])
def test_each_site_draws_once(stn, graph):
    drawn = [n for n in stn.graph(graph).graph.nodes if n.target is dropout_mask]
    assert len(drawn) == len([n for n in stn.hparams.names if n.endswith("dropout")])


def test_with_the_same_seed_two_runs_are_identical(stn, batch):
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(fxstn.response_loss(stn, F.cross_entropy, *batch).item())
    assert losses[0] == losses[1]


def test_condition_moves_the_strengths_of_each_example():
    """A condition that sends the rate of some examples to 0 and of others to its upper end."""
    net = nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.5), nn.Linear(1000, 1000))
    nn.init.constant_(net[0].bias, 1.0)
    nn.init.zeros_(net[0].weight)
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(1000))
        net[2].bias.zero_()
    stn = fxstn.transform(net, [hp.Dropout("1", init=0.5, high=0.9)]).train()
    condition = torch.tensor([[-40.0], [40.0], [0.0]])
    y, _ = stn.pushforward(torch.zeros(3, 4), delta=torch.zeros(1), condition=condition)
    dropped = (y == 0).float().mean(1)
    assert dropped[0] == 0
    assert abs(dropped[1] - 0.9) < 0.04
    assert abs(dropped[2] - 0.5) < 0.06


def test_dropout_masks_have_the_rate_and_the_mean_of_dropout():
    x = torch.ones(2, 400, 500)
    mask = dropout_mask(x, torch.tensor([0.2, 0.7]))
    for row, p in zip(mask, (0.2, 0.7), strict=True):
        rate = (row == 0).double().mean().item()
        assert abs(rate - p) < 5 * (p * (1 - p) / row.numel()) ** 0.5
        assert torch.allclose(row.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    channels = dropout_mask(torch.ones(3, 7, 5, 5), 0.5, spatial=2)
    assert channels.shape == (3, 7, 1, 1)
    assert not dropout_mask(x, 1.0).any()
    assert dropout_mask(torch.ones(3, dtype=torch.long), 0.5) == 1


def test_a_mask_on_cuda_is_drawn_by_one_kernel_and_scaled_by_another(monkeypatch):
    """Also per example and in half precision; the kernel has the rates, which the CPU shows."""
    with fake_cuda(), (launches := Launches()):
        x, p = (torch.empty(size, device="cuda") for size in ((4, 3, 5, 5), (4,)))
        keep = keep_rates(p)
        launches.seen.clear()
        assert dropout_mask(x.bfloat16(), p, keep_rate=keep).dtype == torch.bfloat16
    others = {"detach", "device", "empty", "view", "_to_copy"}  # no kernels, and the conversion of x here
    assert {name: number for name, number in launches.seen.items() if name not in others} == {"bernoulli_": 1, "div": 1}
    assert not launches.unlike
    monkeypatch.setattr(noise, "_is_serial", lambda x: False)
    test_dropout_masks_have_the_rate_and_the_mean_of_dropout()
    assert not dropout_mask(
        x := torch.ones(9), torch.tensor(torch.nan)
    ).any()  # where the device would stop the process
    assert dropout_mask(x, torch.tensor(0.0)).eq(1).all()


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(400, 500)
    multiplier, shift = alpha_dropout_coefficients(x, 0.3)
    y = x * multiplier + shift
    assert abs(y.mean()) < 0.02
    assert abs(y.var() - 1) < 0.03


def test_the_hypergradient_is_the_derivative_of_the_validation_loss_along_the_response():
    net = SmallConv(norm=False).double()
    stn = fxstn.transform(net, [hp.Scalar("a", 0.4, 0, 1, scale=1e-9), hp.WeightDecay("head", scale=1e-9)])
    randomize_response(stn)
    x, target = torch.randn(6, 3, 8, 8).double(), torch.randint(5, (6,))
    fxstn.hyper_loss(stn, F.cross_entropy, x, target, entropy_weight=0.0).backward()
    stn.eval()
    for i in range(2):
        unit = torch.eye(2).double()[i]
        with torch.no_grad():
            moved = [
                F.cross_entropy(functional_call(net.eval(), stn.best_response(s * unit), x), target)
                for s in (1e-6, -1e-6)
            ]
        difference = (moved[0] - moved[1]).item() / 2e-6
        assert stn.hparams.unconstrained.grad[i].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("specs", [[hp.Dropout("2"), hp.WeightDecay()], [hp.WeightDecay(shared=True)]])
@pytest.mark.parametrize("response", ["scaled", "structured"])
def test_the_pulled_back_gradient_is_the_derivative_of_the_training_loss_along_the_response(response, specs):
    net = mlp(0.0).double()
    stn = fxstn.transform(net, specs, response=response).train()
    randomize_response(stn)
    x, target = torch.randn(16, 6).double(), torch.randint(3, (16,))
    stn.hparams.double()

    def loss(weights):
        torch.manual_seed(2)
        twin = copy.deepcopy(stn)
        twin.model.load_state_dict(weights)
        return fxstn.general_loss(twin, F.cross_entropy, x, target)

    torch.manual_seed(2)
    fxstn.general_loss(stn, F.cross_entropy, x, target).backward()
    found = stn.hypergradient()
    assert not found.requires_grad  # or it would keep the gradients of w₀ until the hyper step
    for i, direction in enumerate(torch.eye(len(stn.hparams), dtype=torch.float64)):
        up, down = (loss(stn.best_response(step * direction)) for step in (1e-6, -1e-6))
        torch.testing.assert_close(found[i], (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


def test_the_entropy_term_widens_the_perturbation_and_only_that():
    stn = fxstn.transform(mlp(), [hp.Scalar("a", 0.4, 0, 1)])
    loss = [fxstn.hyper_loss(stn, lambda y, t: y.sum() * 0, torch.randn(4, 6), None, entropy_weight=w) for w in (0, 2)]
    assert loss[0].item() == 0
    assert loss[1].item() == pytest.approx(-2 * torch.distributions.Normal(0, 1).entropy().item(), rel=1e-6)
    loss[1].backward()
    assert stn.hparams.raw_scale.grad.item() < 0
    assert not stn.hparams.unconstrained.grad.any()


def test_a_loss_that_reads_hparams_gets_them_per_example_and_none_in_the_hyper_step():
    seen = []

    def loss_fn(output, target, hparams=None):
        seen.append(hparams)
        loss = F.cross_entropy(output, target, reduction="none")
        return (loss * (1 + hparams["weight"])).mean() if hparams else loss.mean()

    stn = fxstn.transform(mlp(), [hp.Scalar("weight", 0.5, 0, 1), hp.Dropout("2")])
    x, target = torch.randn(7, 6), torch.randint(3, (7,))
    for step in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        step(stn, loss_fn, x, target).backward()
    general, response, hyper = seen
    assert general["weight"].shape == response["weight"].shape == (7,)
    assert general["weight"].unique().numel() == 1
    assert response["weight"].unique().numel() == 7
    assert hyper is None
    fxstn.response_loss(stn, loss_fn, x, target, perturb="batch")
    assert seen[-1]["weight"].unique().numel() == 1


def test_the_general_loss_adds_half_lambda_times_the_squared_norm():
    stn = fxstn.transform(mlp(0.0), [hp.WeightDecay("0", "6", init=0.01)]).double()
    x, target = torch.randn(4, 6).double(), torch.randint(3, (4,))
    for module in stn.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    difference = fxstn.general_loss(stn, F.cross_entropy, x, target) - F.cross_entropy(stn(x), target)
    expected = sum(0.5 * 0.01 * stn.model[i].weight.square().sum() for i in (0, 6))
    assert difference.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_response_step_costs_no_gradient_through_the_primal(stn, batch):
    """Everything the autograd graph of the response loss reaches is a response parameter."""
    loss = fxstn.response_loss(stn, F.cross_entropy, *batch)
    leaves, seen, pending = set(), set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending += [edge for edge, _ in node.next_functions]
    assert leaves == {id(p) for p in stn.response_parameters()}


def test_sizes_and_scalars_in_the_forward_stay_python_numbers(stn):
    assert not any(n.target is torch.add for n in stn.graph("train").graph.nodes)
    assert any(n.target is operator.add for n in stn.graph("train").graph.nodes)


class Gain(hp.Operation):
    """x (1 + gain): a batch norm undoes it, if it is that of all examples."""

    numbers: ClassVar = {"gain": hp.Hyperparameter(0.5, 0.0, 2.0)}

    @staticmethod
    def draw(x, gain):
        return 1 + by_example(gain, x)

    @staticmethod
    def apply(x, factor):
        return x * factor


def regression():
    """A network whose weights no gain changes, at its best, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(256, 4)
    with torch.no_grad():
        y = model(x)
    return fxstn.transform(model, [Gain("input")]).train(), x, y


def learned(perturb, steps=200):
    """‖Θ‖ after so many steps, as the largest change of an output at ε = 1."""
    stn, x, y = regression()
    optimizer = torch.optim.Adam(stn.response_parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        fxstn.response_loss(stn, F.mse_loss, x, y, perturb=perturb).backward()
        optimizer.step()
    plain, moved = stn.model, {name: w.detach() for name, w in stn.best_response(torch.ones(1)).items()}
    return (torch.func.functional_call(plain, moved, x) - plain(x)).abs().max().item()


def test_what_batch_norms_undo_is_learned_per_example_and_not_by_batch():
    """Truth: the best weights are the same at any gain that all examples share (docs/results/hypergradient.md, Batch norm)."""
    assert learned("batch") < 0.01
    assert learned("auto") < 0.01
    assert learned("example") > 0.1


class Functional(nn.Module):
    """Normalises by the batch without a module that says so."""

    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


def test_examples_have_an_epsilon_each_unless_a_batch_norm_joins_them():
    def drawn(norm, frozen=False, **settings):
        stn = fxstn.transform(
            nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.2), nn.Linear(8, 2)), **settings
        ).train()
        if frozen:
            stn.model[1].eval()
        return tuple(losses.perturbation(stn, torch.randn(5, 4), "auto").shape)

    assert drawn(nn.LayerNorm(8)) == (5, 1)
    assert drawn(nn.BatchNorm1d(8)) == (1,)
    assert drawn(nn.BatchNorm1d(8, track_running_stats=False)) == (1,)
    assert drawn(Functional()) == (1,)
    assert drawn(nn.BatchNorm1d(8), statistics="running") == (5, 1)
    assert drawn(nn.BatchNorm1d(8), frozen=True) == (5, 1)
    assert drawn(nn.BatchNorm1d(8, track_running_stats=False), statistics="running") == (1,)
