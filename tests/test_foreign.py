"""What is not the model's stays as it was: the gradients of a loss's own parameters."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxstn
from fxstn import hp
from tests.runs import make
from tests.test_tune import QUICK, loaders, mlp, sgd


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.scale, target)


def within_a_function(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: loss(output, target)


@pytest.mark.parametrize("wrap", [lambda loss: loss, within_a_function])
@pytest.mark.parametrize("before", [False, True])
def test_the_gradients_of_a_loss_are_those_of_the_loop(wrap: Callable, before: bool) -> None:
    """Its own optimizer may step after the tuner has read the loss on other batches, or before."""
    model, loss, (loader, valid) = mlp(0.3), Scaled(), loaders()
    optimizers = [sgd(model), torch.optim.SGD(loss.parameters(), 0.1)]
    tuner = fxstn.tune(model, optimizers[0], wrap(loss), loader, valid, [hp.Dropout(), hp.WeightDecay()], **QUICK)
    for x, y in itertools.chain(loader, loader):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model(x), y).backward()
        gradient = loss.scale.grad.clone()
        for optimizer in reversed(optimizers) if before else optimizers:
            optimizer.step()
            assert torch.equal(loss.scale.grad, gradient)
    assert len(tuner.history) == 2
    assert all(math.isfinite(row["response_loss"]) for row in tuner.history.rows)


def test_a_run_whose_loss_has_parameters_of_its_own_says_that_nothing_trains_them() -> None:
    loss = Scaled()
    with pytest.warns(UserWarning, match=r"reads 1 parameters that are not the model's \(of shape \(3,\)\)") as caught:
        make(loss_fn=loss).fit(2)
    assert sum("not the model's" in str(warning.message) for warning in caught) == 1
    assert loss.scale.grad is None
    loss.scale.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(loss_fn=loss).fit(1)
