"""Sizes that change from batch to batch: lengths, images, last batches; on every frontend, also where sizes agree by chance."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.frontends import graph_cache
from fxstn.tools.reference import move_weights
from fxstn.tools.verify import central_difference

DROPOUT = [hp.Dropout("drop")]


class Attention(nn.Module):
    """Tokens under a mask: causal, padded, relative positions, and lengths that Python computes with."""

    def __init__(self, branch=True):
        super().__init__()
        self.table, self.out, self.branch = nn.Embedding(13, 8), nn.Linear(8, 3), branch
        self.q, self.k, self.v, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, ids, mask=None):
        length = ids.shape[1]
        if self.branch and length > 32:
            raise ValueError("at most 32 tokens")
        place = torch.arange(length, device=ids.device)
        h = self.table(ids) + torch.sin(place / 3.0)[:, None]
        q, k, v = (layer(h).view(ids.shape[0], length, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / math.sqrt(4.0) - 0.1 * (place[:, None] - place[None]).abs()
        causal = torch.ones((length, length), device=ids.device).tril()
        scores = scores.masked_fill(causal == 0, -1e9)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        h = self.drop((scores.softmax(3) @ v).transpose(1, 2).reshape(ids.shape[0], length, 8))
        return self.out(torch.tanh(h).mean(1))


class Pooled(nn.Module):
    """Images of any size; a small one is not strided over again."""

    def __init__(self, branch=True):
        super().__init__()
        self.first, self.second, self.drop = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Dropout(0.2)
        self.out, self.branch = nn.Linear(16, 3), branch

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if not self.branch or h.shape[-1] > 4:
            h = torch.tanh(self.second(h))
        return self.out(self.drop(F.adaptive_avg_pool2d(h, 2).flatten(1)))


class Recurrent(nn.Module):
    def __init__(self, branch=True):
        super().__init__()
        self.rnn, self.drop, self.out = nn.LSTM(3, 4, batch_first=True), nn.Dropout(0.2), nn.Linear(4, 3)
        self.branch = branch

    def forward(self, x):
        h, _ = self.rnn(x)
        if self.branch and x.shape[1] < 2:
            h = h * 2
        return self.out(self.drop(h).mean(1))


class Unrolled(nn.Module):
    """A loop over time in Python, which a graph can only hold for one length."""

    def __init__(self):
        super().__init__()
        self.cell, self.drop, self.out = nn.Linear(7, 4), nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = self.drop(torch.tanh(self.cell(torch.cat([x[:, t], h], 1))))
        return self.out(h)


def tokens(rows, length):
    torch.manual_seed(rows * 100 + length)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()
    return torch.randint(13, (rows, length)), mask


def image(rows, size):
    return (torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(size)),)


def sequence(rows, length):
    return (torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(length)),)


# model, inputs, sizes of the examples, sizes that come later
CASES = {
    "attention": (Attention, tokens, (4, 6), [(4, 9), (5, 5), (1, 3), (3, 1)]),
    "attention, as long as the batch": (Attention, tokens, (6, 6), [(6, 9), (5, 5)]),
    "attention, one example": (Attention, tokens, (1, 6), [(4, 9)]),
    "pooled": (Pooled, image, (4, 8), [(3, 20), (1, 5)]),
    "recurrent": (Recurrent, sequence, (4, 5), [(6, 6), (1, 3)]),
}
MODES = [(name, trace) for name in CASES for trace in ("fx", "export", "live")] + [("unrolled", "export")]
CASES["unrolled"] = (Unrolled, sequence, (4, 5), [(3, 3), (2, 3)])


def network(name, trace):
    make, inputs, example, others = CASES[name]
    torch.manual_seed(0)
    model = (make(branch=trace != "fx") if make is not Unrolled else make()).double()
    stn = fxstn.transform(model, DROPOUT, example_inputs=as_double(inputs(*example)), trace=trace)
    assert stn.frontend == trace
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.normal_()
    return stn, [as_double(inputs(*sizes)) for sizes in (*others, example)]


def moved(original, stn, delta):
    """The original, in eval mode, at the weights that the response predicts."""
    move_weights(original, stn, delta)
    return original.eval()


def as_double(inputs):
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize(("name", "trace"), MODES)
def test_values_and_tangents_per_example_at_other_sizes(name, trace):
    stn, batches = network(name, trace)
    original = copy.deepcopy(stn.model)
    for inputs in batches:
        rows = len(inputs[0])
        torch.testing.assert_close(stn.eval()(*inputs), stn.model(*inputs))
        deltas = torch.randn(rows, 1, generator=torch.Generator().manual_seed(rows)).double()
        y, _ = stn.pushforward(*inputs, delta=deltas[0])
        torch.testing.assert_close(y, stn.model(*inputs))
        each = [stn.pushforward(*inputs, delta=delta)[1][i] for i, delta in enumerate(deltas)]
        for i, delta in enumerate(deltas[:2]):
            difference = central_difference(lambda step: moved(original, stn, step * delta)(*inputs)[i], 1e-6)  # noqa: B023
            torch.testing.assert_close(each[i], difference, rtol=1e-6, atol=1e-8)
        if trace != "live" and stn.per_example(*inputs):
            _, dy = stn.pushforward(*inputs, delta=deltas)
            torch.testing.assert_close(dy, torch.stack(each))


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_the_tangent_is_checked_at_a_length_that_was_not_the_examples(trace):
    model, x = Attention(branch=trace != "fx"), tokens(3, 7)
    result = fxstn.verify(model, *x, hparams=DROPOUT, trace=trace, example_inputs=tokens(4, 5))
    assert (result.ok, result.frontend) == (True, trace), result


def test_a_length_without_a_graph_is_an_error_that_says_so():
    stn, _ = network("attention", "export")
    with pytest.raises(ValueError, match=r"sizes of its inputs with ids.shape\[1\] <= 32; .*at most 32 tokens"):
        stn.train()(*tokens(2, 40))


def test_a_forward_that_differs_for_one_example_is_captured_for_it():
    """Export takes it for true that no symbol is 1, unless it is told otherwise."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.shape[0] == 1 else self.layer(x).tanh()

    stn = fxstn.transform(Single(), [hp.Scalar("a", 0.5, 0, 1)], example_inputs=torch.randn(4, 3), trace="export")
    for rows in (1, 5):
        x = torch.randn(rows, 3)
        assert torch.equal(stn.train()(x), stn.model(x))


def test_a_copy_and_a_changed_module_forget_the_other_captures():
    stn, (big, *_, example) = network("pooled", "export")
    stn.train().conditioned_output(*big)
    assert stn._graphs.others
    twin = pickle.loads(pickle.dumps(stn))
    assert not twin._graphs.others
    twin.model.first.stride = (1, 1)
    for inputs in (big, example):
        y, _ = twin.eval().pushforward(*inputs, delta=torch.zeros(1).double())
        torch.testing.assert_close(y, twin.model(*inputs))


def test_many_captures_are_a_warning(monkeypatch):
    monkeypatch.setattr(graph_cache, "MANY", 2)
    stn, _ = network("unrolled", "export")
    stn.train()(*as_double(sequence(2, 2)))
    with pytest.warns(
        UserWarning, match=r"exported anew for 2 sizes of its inputs.*pad to a few lengths, or give transform"
    ):
        stn(*as_double(sequence(2, 3)))


def test_places_of_lambda_that_depend_on_the_length_are_refused():
    class Longer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.more = nn.Linear(3, 3), nn.Dropout(0.1), nn.Dropout(0.2)

        def forward(self, x):
            h = self.drop(self.a(x))
            return self.more(h) if x.shape[1] > 4 else h

    stn = fxstn.transform(Longer(), example_inputs=torch.randn(2, 3, 3), trace="export").train()
    assert stn.hparams.names == ("drop.dropout",)
    with pytest.raises(ValueError, match=r"x.shape\[1\] <= 4.*the hyperparameters have other places in it"):
        stn(torch.randn(2, 5, 3))


class Placed(nn.Module):
    """Places that are looked up, all of them or, by themselves, the first."""

    def __init__(self, branch=True):
        super().__init__()
        self.table, self.place, self.drop = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Dropout(0.1)
        self.register_buffer("places", torch.arange(8))
        self.branch = branch

    def forward(self, x):
        places = self.places[:1] if self.branch and x.shape[1] == 1 else self.places[: x.shape[1]]
        return self.drop(torch.tanh(self.table(x) + self.place(places)))


def test_a_lookup_that_is_constant_at_one_length_keeps_its_tangent():
    for length in (6, 1):
        x, example = torch.randint(9, (3, length)), torch.randint(9, (4, 5))
        assert fxstn.verify(Placed(), x, hparams=DROPOUT, trace="export", example_inputs=example).ok


def test_examples_between_two_other_sizes_are_located_again_at_another_length():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x.transpose(0, 1).reshape(-1, 2)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    stn = fxstn.transform(Folded(), [hp.Scalar("a", 0.5, 0, 1)]).eval()
    with torch.no_grad():
        stn.response.get_submodule("layer.weight").U.normal_()
    for length in (5, 7, 2):
        x, deltas = torch.randn(4, length, 6), torch.randn(4, 1)
        each = [stn.pushforward(x, delta=delta)[1][i] for i, delta in enumerate(deltas)]
        torch.testing.assert_close(stn.pushforward(x, delta=deltas)[1], torch.stack(each))


@pytest.mark.parametrize("length", [3, 5])
def test_a_length_is_not_taken_for_the_few_examples_that_are_tried(length):
    stn = fxstn.transform(Placed(branch=False), DROPOUT)
    assert stn.per_example(torch.randint(9, (4, length)))


def test_inputs_may_share_the_batch_without_an_operation_that_says_so():
    """A mask that is reshaped by the size of another input, as in GPT-2."""

    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids, mask):
            return (self.table(ids) * mask.view(ids.shape[0], -1)[..., None]).sum(1) if ids.shape[1] < 9 else mask

    inputs = torch.randint(9, (4, 5)), torch.ones(4, 5)
    stn = fxstn.transform(Reshaped(), [hp.Scalar("a", 0.5, 0, 1)], example_inputs=inputs, trace="export")
    ids, mask = torch.randint(9, (3, 6)), torch.rand(3, 6)
    assert torch.equal(stn.train()(ids, mask), stn.model(ids, mask))
