"""fxstn.tune in loops with several optimizers, not all of which step on every batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from tests.runs import same, without_times
from tests.test_tune import QUICK, loaders

BATCHES = 5  # of an epoch
ODD = (0, 2)  # the epoch and the number of the batch on which one optimizer has no step


class Loop:
    """One optimizer for the first layer, and one for the last one.

    tunes: whether there is a tuner.
    rests: whether its λ hardly moves, and is of weight decay alone: dropout draws other masks than the plain module.
    """

    def __init__(self, tunes: bool = True, rests: bool = False) -> None:
        torch.manual_seed(0)
        self.loader, valid = loaders()
        first, x = nn.LazyLinear(16), next(iter(self.loader))[0]
        self.model = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.3 * (tunes and not rests)), nn.LazyLinear(3))
        self.model(x)
        self.optimizers = [torch.optim.SGD(self.model[i].parameters(), 0.1, 0.9, weight_decay=1e-2) for i in (0, 3)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        hyper = fxstn.HyperSettings(optimizer=lambda params: torch.optim.SGD(params, 1e-12)) if rests else None
        settings = QUICK if hyper is None else QUICK | {"hyper": hyper}
        specs = [hp.WeightDecay(shared=True), *([] if rests else [hp.Dropout()])]
        torch.manual_seed(7)
        self.tuner: Any = (
            fxstn.tune(self.model, self.optimizers, F.cross_entropy, self.loader, valid, specs, **settings)
            if tunes
            else None
        )

    def train(self, odd: str = "", order: tuple[int, int] = (0, 1), epochs: range = range(3)) -> None:
        """odd: "overflow", or "unused": the first layer has no gradient. order: of the optimizers."""
        for epoch in epochs:
            for number, (x, y) in enumerate(self.loader):
                torch.manual_seed(100 * epoch + number)
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
                if (epoch, number) == ODD:
                    self.spoil(odd)
                for i in order:
                    if self.model[3 * i].weight.grad is not None:
                        self.scaler.step(self.optimizers[i])
                self.scaler.update()

    def spoil(self, odd: str) -> None:
        for parameter in self.model[0].parameters():
            if odd == "overflow":
                parameter.grad[0] = math.inf
            elif odd:
                parameter.grad = None

    def states(self) -> list[dict[str, Any]]:
        return copy.deepcopy([part.state_dict() for part in (self.model, *self.optimizers, self.tuner)])

    def load(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip((self.model, *self.optimizers, self.tuner), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("odd", ["overflow", "unused"])
def test_a_step_that_one_optimizer_leaves_out_changes_nothing_but_that(odd: str, order: tuple[int, int]) -> None:
    """λ that rests leaves plain training, and λ that moves stays a number; the tuner works after the last optimizer, always."""
    plain, rests = Loop(tunes=False), Loop(rests=True)
    for loop in (plain, rests):
        loop.train(odd, order)
    torch.testing.assert_close(rests.model.state_dict(), plain.model.state_dict())
    loop, seen = Loop(), []
    own = loop.tuner._advance
    stepped: list[int] = []
    for i, optimizer in enumerate(loop.optimizers):
        optimizer.register_step_pre_hook(lambda *_, i=i: stepped.append(i))
    loop.tuner._advance = lambda batches: (seen.append(tuple(stepped)), stepped.clear(), own(batches))
    loop.train(odd, order)
    loop.tuner.detach()
    assert loop.tuner.steps == 3 * BATCHES
    assert all(map(math.isfinite, loop.tuner.values().values()))
    assert [len(part) for part in seen] == [1 if number == ODD[1] else 2 for number in range(3 * BATCHES)]


@pytest.mark.parametrize("odd", ["overflow", "unused"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_loop_with_such_a_step_goes_on_as_if_it_had_never_stopped(odd: str, stop: int) -> None:
    whole, first, second = Loop(), Loop(), Loop()
    whole.train(odd)
    first.train(odd, epochs=range(stop))
    second.load(first.states())
    second.scaler = first.scaler
    second.train(odd, epochs=range(stop, 3))
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert same(without_times(second.tuner.history.rows), without_times(whole.tuner.history.rows))


@pytest.mark.parametrize("observed", [True, False])
def test_an_optimizer_that_never_steps_keeps_nothing_from_being_tuned(observed: bool) -> None:
    torch.manual_seed(0)
    loader, valid = loaders()
    batches: Any = loader if observed else list(loader)
    model, other = nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.3)), nn.Linear(2, 2)
    model(next(iter(loader))[0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuner = fxstn.tune(
        model, [optimizer, torch.optim.SGD(other.parameters(), 0.1)], F.cross_entropy, batches, valid, **QUICK
    )
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    tuner.detach()
    assert (tuner.steps, len(tuner.history)) == ((2 * BATCHES, 2) if observed else (2 * BATCHES - 1, 1))
