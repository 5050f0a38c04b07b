"""Live duals with one perturbation per example: each row moves as the original does at the weights of its own λ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fxstn
from fxstn import hp
from fxstn.bilevel.perturbation import joins_examples
from tests.nets import mlp, randomize_response

BATCH, TIME, WIDTH, EXPERTS = 4, 5, 6, 3
TWO = [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("b", 0.5, 0, 1)]
LENGTHS = torch.tensor([3, 5, 2, 4])


class Net(nn.Module):
    """Layers, experts in lists and in stacked weights, and bare parameters, with any function of them between."""

    def __init__(self, body):
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)) for _ in range(EXPERTS)
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 8) / 2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 1, 8))
        self.down = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH) / 2)
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.table = nn.Parameter(torch.randn(2 * TIME, 1))
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.body = body
        self.slope, self.slopes = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(TIME))

    def forward(self, x):
        return self.body(self, x)


BODIES = []


def body(function):
    BODIES.append(function)
    return function


def tokens(net, x):
    h = torch.tanh(net.enter(x))
    weights, chosen = net.gate(h.flatten(0, 1)).softmax(-1).max(-1)
    return h, h.flatten(0, 1), weights[:, None], chosen


@body
def slopes_of_channels(net, x):
    """Along dimension 1, whatever broadcasting says; also as many as there are examples."""
    h = net.enter(x)
    return net.leave(F.prelu(F.prelu(F.prelu(h, net.slopes)[:, :BATCH], net.slopes[:BATCH]) - 0.5, net.slope))


@body
def a_mask_of_parameters_alone(net, x):
    """It does not move, neither do comparisons with it, and what it multiplies does."""
    h = net.enter(x)
    kept = net.up[0] * (net.up[0].abs() > net.up[0].abs().median()).to(h.dtype)
    return net.leave(torch.where(torch.gt(h, net.latents[0] * 2), h, 0.5 * h) @ kept @ net.down[0])


@body
def experts_add_to_rows(net, x):
    h, flat, weights, chosen = tokens(net, x)
    y = torch.zeros_like(flat)
    for number, expert in enumerate(net.experts):
        (rows,) = torch.where(chosen == number)
        y.index_add_(0, rows, expert(flat[rows]) * weights[rows])
    return net.leave(h + y.view_as(h)).mean(1)


@body
def experts_of_whole_examples_by_pairs_of_indices(net, x):
    """Each expert has another number of rows, one of them as many as there are examples."""
    h = net.enter(x).mean(1)
    weights, chosen = net.gate(h).softmax(-1).topk(2)
    y = torch.zeros(h.shape, dtype=h.dtype)
    for number, expert in enumerate(net.experts):
        rows, ranks = torch.where(chosen == number)
        y[rows] += weights[rows, ranks, None] * expert(h[rows])
    rows, ranks = torch.where(torch.arange(2) == (torch.arange(len(h))[:, None] + 1) % 2)
    y[rows.flip(0)] += weights[rows.flip(0), ranks.flip(0), None] * net.experts[0](h[rows.flip(0)])
    return net.leave(h + y)


@body
def stacked_experts_of_a_loop(net, x):
    h, flat, weights, chosen = tokens(net, x)
    y = torch.zeros_like(flat)
    for number in F.one_hot(chosen, EXPERTS).sum(0).nonzero()[:, 0]:
        mask = chosen == number
        y[mask] = F.linear(torch.relu(flat[mask] @ net.up[number]), net.down[number].t()) * weights[mask]
    return net.leave(h + y.view_as(h)).mean(1)


@body
def sorted_by_expert(net, x):
    h, flat, weights, chosen = tokens(net, x)
    order = chosen.argsort()
    parts = flat[order].split(torch.bincount(chosen, minlength=EXPERTS).tolist())
    y = torch.cat([expert(part) for expert, part in zip(net.experts, parts, strict=True)])[order.argsort()]
    return net.leave(h + (y * weights).view_as(h)).mean(1)


@body
def experts_choose_tokens(net, x):
    h, flat, _, _ = tokens(net, x)
    scores, rows = net.gate(flat).softmax(-1).t().topk(6, -1)
    y = torch.zeros_like(flat)
    for expert, score, row in zip(net.experts, scores, rows, strict=True):
        y = y.scatter_add(0, row[:, None].expand(-1, WIDTH), expert(flat[row]) * score[:, None])
    return net.leave(h + y.view_as(h)).mean(1)


@body
def dispatched_to_slots_of_which_some_stay_empty(net, x):
    h, flat, weights, chosen = tokens(net, x)
    one = F.one_hot(chosen, EXPERTS)
    slot = ((one.cumsum(0) - 1) * one).sum(-1)
    dispatch = (F.one_hot(slot, len(flat))[:, None] * one[..., None]).to(flat)
    slots = torch.relu(torch.bmm(torch.einsum("nec,nd->ecd", dispatch, flat), net.up) + net.bias)
    y = torch.einsum("nec,ecd->nd", dispatch * weights[..., None], torch.bmm(slots, net.down))
    return net.leave(h + y.view_as(h)).mean(1)


@body
def branches_by_masks(net, x):
    h = torch.tanh(net.enter(x))
    first, y = h[..., 0] > 0, torch.empty_like(h)
    y[first], y[~first] = net.experts[0](h[first]), net.norm(h[~first])
    return net.leave(y).mean(1)


@body
def rows_of_an_input_where_a_mask_is_off(net, x):
    flat = F.pad(x, (0, WIDTH - 4)).reshape(-1, WIDTH)
    y, mask = flat.clone(), torch.arange(len(flat)) % 3 == 0
    y[mask] = net.experts[0](flat[mask])
    return net.leave(y.view(BATCH, TIME, WIDTH)).mean(1)


@body
def tokens_of_a_sequence_skip_a_block(net, x):
    h = net.enter(x)
    score, index = net.gate(h)[..., 0].topk(2, 1)
    index = index[..., None].expand(-1, -1, WIDTH)
    return net.leave(h.scatter_add(1, index, net.experts[0](h.gather(1, index)) * score[..., None]).mean(1))


@body
def sequences_joined_to_one(net, x):
    flat = torch.cat([row[:n] for row, n in zip(x, LENGTHS.tolist(), strict=True)])
    return torch.stack([part.mean(0) for part in net.leave(net.experts[0](net.enter(flat))).split(LENGTHS.tolist())])


@body
def packed_sequences(net, x):
    packed = nn.utils.rnn.pack_padded_sequence(net.enter(x), LENGTHS, batch_first=True, enforce_sorted=False)
    return net.leave(net.rnn(packed)[1][0][-1])


@body
def latents_go_through_layers_before_they_meet_examples(net, x):
    h, latents = net.enter(x), net.experts[0](net.norm(net.latents))
    return net.leave((h @ latents.t()).softmax(1).transpose(1, 2) @ h + latents).mean(1)


@body
def memory_and_relative_positions(net, x):
    h = torch.cat([net.latents[:1].expand(len(x), -1, -1), net.enter(x)[:, 1:]], 1)
    position = torch.arange(TIME)
    bias = net.table[position[:, None] - position + TIME - 1][..., 0]
    return net.leave(((h @ h.transpose(1, 2) + bias).softmax(-1) @ h)[:, 0])


@body
def examples_leave_early(net, x):
    h, alive = net.enter(x).mean(1), torch.arange(len(x))
    result = h.new_zeros(len(x), 2)
    for expert in net.experts:
        h = torch.tanh(expert(h))
        stop = h[:, 0] > 0.1
        result = result.index_copy(0, alive[stop], net.leave(h[stop]))
        h, alive = h[~stop], alive[~stop]
    return result.index_copy(0, alive, net.leave(h))


def located(body, hparams=TWO, **options):
    torch.manual_seed(0)
    net = Net(body).double()
    x = torch.randn(BATCH, TIME, 4, dtype=torch.float64)
    stn = fxstn.transform(net, hparams, example_inputs=(x,), trace="live", **options).eval()
    randomize_response(stn)
    return stn, x


@pytest.mark.parametrize("response", ["scaled", "structured"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_each_example_moves_as_the_original_does_along_its_own_delta(body, response):
    stn, x = located(body, response=response)
    assert stn.per_example(x)
    deltas = torch.randn(BATCH, 2, dtype=torch.float64)
    y, dy = stn.pushforward(x, delta=deltas)
    torch.testing.assert_close(y, stn.model(x), rtol=0, atol=1e-12)
    for i, delta in enumerate(deltas):
        ends = [functional_call(stn.model, stn.best_response(step * delta), (x,))[i] for step in (1e-6, -1e-6)]
        torch.testing.assert_close(dy[i], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_the_response_loss_per_example_is_that_of_a_graph():
    losses = []
    for trace in ("fx", "live"):
        torch.manual_seed(0)
        x, target = torch.randn(BATCH, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
        stn = fxstn.transform(mlp(0.3).double(), [hp.Dropout()], example_inputs=x, trace=trace).train()
        randomize_response(stn)
        loss = fxstn.response_loss(stn, F.cross_entropy, x, target, perturb=torch.randn(BATCH, 2, dtype=torch.float64))
        losses.append((loss, *torch.autograd.grad(loss, list(stn.response_parameters()))))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)


def mean_of_the_batch(net, x):
    h = net.enter(x).mean(1)
    return net.leave(h + net.experts[0](h.mean(0, keepdim=True)))


def examples_in_another_order(net, x):
    h = net.enter(x).mean(1)
    return net.leave(h + h.flip(0))


def written_through_a_view(net, x):
    y = torch.zeros(BATCH, WIDTH, dtype=x.dtype)
    first = y[0]
    first += net.enter(x[0]).mean(0)
    return net.leave(y)


def rows_of_no_example(net, x):
    y = torch.zeros(BATCH, WIDTH, dtype=x.dtype)
    return net.leave(y.index_add(0, torch.tensor([0, 2]), net.enter(x[[0, 2]]).mean(1)))


@pytest.mark.parametrize(
    "body", [mean_of_the_batch, examples_in_another_order, written_through_a_view, rows_of_no_example]
)
def test_a_layer_of_a_value_without_rows_of_examples_is_named(body):
    stn, x = located(body)
    with pytest.warns(UserWarning, match="refused at module"):
        assert not stn.per_example(x)
    with pytest.raises(ValueError, match="one perturbation per example is refused, because"):
        stn.pushforward(x, delta=torch.zeros(BATCH, 2))
    assert fxstn.response_loss(stn.train(), lambda y, t: y.square().mean(), (x,), None).isfinite()


def test_a_batch_norm_joins_the_examples_of_a_forward_that_runs_as_it_is():
    net, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(BATCH, 6)
    for trace in ("fx", "live"):
        stn = fxstn.transform(net, TWO, example_inputs=x, trace=trace).train()
        assert stn.per_example(x)
        assert joins_examples(stn)


def test_images_in_a_list_have_a_perturbation_each():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, images, targets=None):
            return [{"boxes": self.out(self.fc(image).relu())} for image in images]

    torch.manual_seed(0)
    images = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 3)]
    inputs = (images, [{"boxes": image[:, :3]} for image in images])
    stn = fxstn.transform(Listed().double(), TWO, example_inputs=inputs, trace="live").eval()
    randomize_response(stn)
    deltas = torch.randn(2, 2, dtype=torch.float64)
    assert stn.per_example(*inputs)
    _, found = stn.pushforward(*inputs, delta=deltas)
    for i, delta in enumerate(deltas):
        torch.testing.assert_close(found[i]["boxes"], stn.pushforward(*inputs, delta=delta)[1][i]["boxes"])


class Shared(nn.Module):
    """Dropout on latents that all examples share, and a temperature for what examples meet in."""

    def __init__(self):
        super().__init__()
        self.latents, self.own, self.drop = nn.Parameter(torch.randn(3, WIDTH)), nn.Dropout(0.2), nn.Dropout(0.3)
        self.mix, self.enter, self.temperature = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(4, WIDTH),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x):
        h, latents = self.drop(self.enter(x)), self.mix(self.own(self.latents))
        h = ((h @ latents.t()).softmax(1).transpose(1, 2) @ h + latents).mean(1)
        return h, F.normalize(h, dim=-1) @ F.normalize(h, dim=-1).t() * self.temperature.exp()


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_what_all_examples_share_has_one_strength_and_the_others_one_each(trace):
    torch.manual_seed(0)
    x = torch.randn(BATCH, TIME, 4, dtype=torch.float64)
    stn = fxstn.transform(Shared().double(), [hp.Dropout()], example_inputs=(x,), trace=trace).train()
    randomize_response(stn)

    def moved(epsilon):
        torch.manual_seed(1)
        return stn.perturbed_output(x, delta=epsilon, condition=epsilon)[0]

    assert stn.per_example(x)
    epsilon = stn.hparams.sample(BATCH).detach()
    assert {n: len(own.unique()) for n, own in zip(stn.hparams.names, epsilon.T, strict=True)} == {
        "own.dropout": 1, "drop.dropout": BATCH
    }  # fmt: skip
    h, together = moved(epsilon)
    for i, own in enumerate(epsilon):
        torch.testing.assert_close(h[i], moved(own)[0][i])
    torch.testing.assert_close(moved(own.expand(BATCH, -1).clone()), moved(own))
    assert together.shape == (BATCH, BATCH)
    with pytest.raises(RuntimeError, match="one strength for all examples of a batch"):
        moved(epsilon + torch.arange(float(BATCH))[:, None])
