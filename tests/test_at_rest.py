"""The hyper step at ε = 0: Θᵀ ∇L_V at the network itself, by a plain backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxstn
from benchmarks.fake_cuda import fake_cuda, move
from benchmarks.launches import Launches
from fxstn import hp
from fxstn.ops import pull_back
from fxstn.ops.response import responses_in
from fxstn.ops.scaled import row_sums, zero_and_one
from tests.nets import SmallConv, randomize_response

SPECS = [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)]


class Tied(nn.Module):
    """A table and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens))).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.head = (
            nn.Embedding(7, 5, sparse=True),
            nn.LSTM(5, 4, 2, batch_first=True),
            nn.Linear(4, 7),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0]).transpose(1, 2)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(7, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.block(self.table(tokens))), -1).transpose(1, 2)


class OwnLoss(nn.Module):
    """A network that returns its loss, and a frozen layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(torch.tanh(self.body(x)))
        return F.cross_entropy(output, x[:, :3].argmax(1)) + 0.1 * output.square().mean()


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(20, 3), nn.Softmax(-1),
    )  # fmt: skip


def negative_log(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(output.log(), target)


def itself(output: Tensor, target: object) -> Tensor:
    return output


TOKENS = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
NETS = {
    "tied": (Tied, TOKENS, TOKENS, F.cross_entropy),
    "recurrent": (Recurrent, TOKENS, TOKENS, F.cross_entropy),
    "attentive": (Attentive, TOKENS, TOKENS, F.nll_loss),
    "own loss": (OwnLoss, IMAGES.flatten(1)[:, :6], None, itself),
    "convolutions": (convolutions, IMAGES, torch.tensor([0, 1, 2, 0]), negative_log),
}


def network(name: str, **options):
    make, x, target, loss_fn = NETS[name]
    torch.manual_seed(1)
    model = make().double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.3)
    stn = fxstn.transform(model, SPECS, example_inputs=x, **{"trace": "fx"} | options)
    randomize_response(stn)
    return stn.train(), loss_fn, x, target


def gradient(stn, *batch, **options) -> Tensor:
    stn.hparams.unconstrained.grad = None
    fxstn.hyper_loss(stn, *batch, entropy_weight=0.0, **options).backward()
    return stn.hparams.unconstrained.grad


LIVE, CENTERED = {"trace": "live"}, {"method": "centered"}
CASES = [
    *((name, {}) for name in NETS),
    *((name, LIVE) for name in ("tied", "recurrent", "own loss", "convolutions")),
    *((name, {"response": "structured"}) for name in ("recurrent", "own loss")),
    *((name, CENTERED) for name in ("tied", "convolutions")),
    ("convolutions", {"recompute": True}),
    ("convolutions", CENTERED | LIVE),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_it_is_the_gradient_through_the_tangent(name, options):
    stn, *batch = network(name, **options)
    tangent = gradient(stn, *batch, perturb=torch.zeros(2).double())
    assert tangent.abs().min() > 1e-6
    torch.testing.assert_close(gradient(stn, *batch, perturb="off"), tangent, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tied", "delta"),
        ("recurrent", "delta"),
        ("own loss", "centered"),
        ("convolutions", "delta"),
        ("convolutions", "centered"),
    ],
)
def test_it_is_a_central_difference_of_the_original_along_the_response(name, method):
    stn, loss_fn, x, target = network(name, method=method, **{"statistics": "running"} if method == "delta" else {})
    found = gradient(stn, loss_fn, x, target, perturb="off")
    original = copy.deepcopy(stn.model).eval()

    def loss(step: Tensor) -> Tensor:
        return loss_fn(functional_call(original, stn.best_response(step), (x,)), target).detach()

    for i, unit in enumerate(torch.eye(2).double()):
        difference = (loss(1e-5 * unit) - loss(-1e-5 * unit)) / 2e-5
        torch.testing.assert_close(found[i], difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("trace", ["fx", "live"])
def test_it_leaves_no_other_trace(trace):
    """Gradients, hooks, running statistics and what requires gradients: everything is as before."""
    stn, *batch = network("convolutions", trace=trace)
    calls = []
    for parameter in stn.model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(lambda g: calls.append("hook"))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    before = copy.deepcopy(stn.model.state_dict())
    loss = fxstn.hyper_loss(stn, *batch, perturb="off")
    loss.backward(retain_graph=True)
    once = stn.hparams.unconstrained.grad.clone()
    loss.backward()
    torch.testing.assert_close(stn.hparams.unconstrained.grad, 2 * once)
    assert not calls
    assert all(p.requires_grad and (p.grad == 1).all() for p in stn.model.parameters())
    assert all(p.requires_grad and p.grad is None for p in stn.response_parameters())
    torch.testing.assert_close(stn.model.state_dict(), before, rtol=0, atol=0)
    fxstn.general_loss(stn, *batch).backward()
    assert "hook" in calls  # they are there again


def test_a_loss_that_reads_λ_itself_has_that_gradient_too():
    stn, loss_fn, x, target = network("tied")
    alone = gradient(stn, loss_fn, x, target, perturb="off").clone()
    direct = lambda output, target: loss_fn(output, target) + 3 * stn.hparams.unconstrained.sum()  # noqa: E731
    torch.testing.assert_close(gradient(stn, direct, x, target, perturb="off"), alone + 3)


def test_no_tangent_is_carried_and_what_does_not_respond_gets_no_gradient():
    stn, *batch = network("convolutions")
    graph = stn.graph("at_rest_eval").graph
    assert not any(node.target == "response" or node.name == "delta" for node in graph.nodes)
    weight, *_ = stn.model.parameters()  # before a batch norm: it does not respond
    output = stn.output_at_rest(batch[1])
    assert torch.autograd.grad(output.square().sum(), weight, allow_unused=True) == (None,)


def test_rows_are_summed_in_blocks_or_by_one_kernel_and_the_sums_are_the_same(monkeypatch):
    torch.manual_seed(0)
    stn = fxstn.transform(SmallConv().double(), [hp.WeightDecay(shared=True)])
    randomize_response(stn)
    for parameter in stn.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    sums = {name: (w.grad * w).flatten(1 if w.dim() > 1 else 0) for name, w in stn.model.named_parameters()}
    responses = responses_in(stn.response).items()
    expected = sum(response.U.T @ sums[name].reshape(len(response.U), -1).sum(1) for name, response in responses)
    for block in (1, 30, pull_back.BLOCK):  # a row at a time, some rows, all rows
        monkeypatch.setattr(pull_back, "BLOCK", block)
        torch.testing.assert_close(stn.hypergradient(), expected)
    by_kernel = lambda a, b: row_sums(a, b, len(a), False, zero_and_one(a))[0]  # noqa: E731
    monkeypatch.setattr(pull_back, "_row_sums_in_blocks", by_kernel)
    torch.testing.assert_close(stn.hypergradient(), expected)
    with fake_cuda(), (launches := Launches()):
        move(stn)
        for parameter in stn.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        stn.hypergradient()
    assert "native_group_norm_backward" in launches.seen
    assert not launches.unlike
