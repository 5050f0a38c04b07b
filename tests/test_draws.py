"""Forwards whose Python draws: from torch, from Python's own generator, or from NumPy's."""

from __future__ import annotations

import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.ir.generators import GlobalRandomState

DRAWS = {
    "Python": lambda: random.random(),
    "NumPy": lambda: numpy.random.random(),
    "torch": lambda: torch.rand(()).item(),
}


class Decoder(nn.Module):
    """Puts out a word after the other. It goes on with the right word or, by a draw, with its own: teacher forcing."""

    def __init__(self, draw):
        super().__init__()
        self.words, self.dropout, self.out = nn.Embedding(9, 6), nn.Dropout(0.3), nn.Linear(6, 9)
        self.draw, self.forced = draw, []

    def forward(self, target):
        word, scores = target[:, 0], []
        for time in range(1, target.shape[1]):
            scores.append(self.out(self.dropout(torch.tanh(self.words(word)))))
            self.forced.append(self.draw() < 0.5)
            word = target[:, time] if self.forced[-1] else scores[-1].argmax(1)
        return torch.stack(scores, 1)


class Layers(nn.Module):
    """Layers that training leaves out at a rate, as fairseq writes it."""

    def __init__(self, rate, draw, keeps):
        super().__init__()
        self.layers, self.dropout = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)]), nn.Dropout(0.1)
        self.layerdrop, self.draw, self.keeps = rate, draw, keeps

    def forward(self, x):
        for layer in self.layers:
            if not self.training or self.keeps(self.draw(), self.layerdrop):
                x = self.dropout(layer(x)) + x
        return x


def words():
    return torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("draw", ["Python", "NumPy"])
def test_verify_compares_passes_with_the_same_draws(draw):
    report = fxstn.verify(Decoder(DRAWS[draw]), words(), hparams=[hp.Dropout()], seeds=1)
    assert report.frontend == "live"
    assert report.ok, str(report)


def trained(draw, tuned):
    """The draws of a loop of some epochs, and the states of the generators of Python and NumPy after it."""
    GlobalRandomState.seeded(3).set()
    model = Decoder(DRAWS[draw])
    optimizer, target = torch.optim.SGD(model.parameters(), 0.01), words()
    data = [(target, target)] * 4
    loss = lambda output, target: F.cross_entropy(output.flatten(0, 1), target[:, 1:].flatten())  # noqa: E731
    if tuned:
        fxstn.tune(model, optimizer, loss, data, data, [hp.Dropout()], example_inputs=target)
    own = []
    for _ in range(2):
        for x, y in data:
            model.forced.clear()
            value = loss(model(x), y)
            own += model.forced
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return own, random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize("draw", ["Python", "NumPy"])
def test_a_tuned_loop_trains_on_the_draws_of_an_untuned_one(draw):
    assert trained(draw, True) == trained(draw, False)


@pytest.mark.parametrize("draw", ["Python", "NumPy"])
def test_no_capture_moves_a_generator(draw):
    GlobalRandomState.seeded(3).set()
    model, before = Decoder(DRAWS[draw]), GlobalRandomState.current()
    fxstn.transform(model, [hp.Dropout()], example_inputs=words())
    assert before.still_holds()


@pytest.mark.parametrize(
    "keeps", [lambda u, p: u > p, lambda u, p: u >= p, lambda u, p: not u < p], ids=[">", ">=", "<"]
)
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_layer_that_is_never_left_out_is_not_named(draw, rate, keeps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = fxstn.transform(Layers(rate, DRAWS[draw], keeps), example_inputs=torch.rand(4, 3))
    assert ("layers.0.layer_drop" in network.hparams.values()) == (rate > 0)
