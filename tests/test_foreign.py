"""What is the loop's alone: gradients of a loss's own parameters, what a forward draws, a state that the model keeps."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxstn
from fxstn import hp
from tests.runs import make, same
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


DRAWS = {
    "torch": lambda x: torch.randn_like(x),
    "NumPy": lambda x: torch.from_numpy(numpy.random.randn(*x.shape)).float(),
    "Python": lambda x: torch.tensor([[random.gauss(0, 1) for _ in row] for row in x]),
}


class Identity(nn.Linear):
    """Returns its input, until it is trained."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def numbers() -> tuple:
    return torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("trace", ["auto", "live"])
@pytest.mark.parametrize("kind", DRAWS)
def test_the_target_that_a_forward_draws_belongs_to_the_input_that_it_draws(kind: str, trace: str) -> None:
    """As in the training of a diffusion model. The loss of the identity is zero for each noise, if it is the same one."""

    def forward(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        noise = DRAWS[kind](batch[0])
        return model(noise), noise

    ends = []
    for tuned in (False, True):
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        model, (loader, valid) = Identity(), loaders()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        if tuned:
            specs = [hp.WeightDecay()]
            tuner = fxstn.tune(
                model, optimizer, F.mse_loss, loader, valid, specs, forward=forward, trace=trace, **QUICK
            )
        for batch in itertools.chain(loader, loader):
            optimizer.zero_grad()
            F.mse_loss(*forward(model, batch)).backward()
            optimizer.step()
        ends.append(numbers())
    assert len(tuner.history) == 2
    for row in tuner.history.rows:
        assert max(row["valid_loss"], row["clean_train_loss"]) < 1e-12
    assert same(*ends)


def test_noise_of_a_forward_is_other_noise_in_each_step_and_the_same_in_each_evaluation() -> None:
    seen: list[float] = []

    def forward(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(batch[0]), 1)
        seen.append(float(noise[0]))
        return model(batch[0] + noise), batch[1]

    model, (loader, valid) = mlp(0.3), loaders(80, size=16)
    optimizer = sgd(model)
    tuner = fxstn.tune(
        model, optimizer, F.cross_entropy, loader, valid, [hp.Dropout()], forward=forward,
        hyper=fxstn.HyperSettings(warmup_epochs=100), response=fxstn.ResponseSettings(every=1),
    )  # fmt: skip
    epochs = []
    for _ in range(2):
        seen.clear()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        tuner.end_epoch()
        epochs.append(set(seen))
    first, second = epochs
    assert len(first - second) >= 5  # of five steps, and of a longer evaluation
    assert len(second - first) == 5
    assert len(first & second) > 2


class Recurrent(nn.Module):
    """Keeps its hidden state from batch to batch, in an attribute or in a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.state, self.read, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        if buffer:
            self.register_buffer("hidden", torch.zeros(4, 8))
        else:
            self.hidden = torch.zeros(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.state(self.hidden) + self.read(x))
        self.hidden = hidden.detach()
        return self.out(hidden)


@pytest.mark.parametrize("buffer", [False, True])
def test_evaluations_leave_the_state_that_a_model_keeps(buffer: bool) -> None:
    losses = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model, (loader, valid) = Recurrent(buffer), loaders(train=40, valid=20, size=4, valid_size=4)
        optimizer = sgd(model, weight_decay=1e-2)
        if tuned:  # λ stays: the hyper steps begin later
            later = fxstn.HyperSettings(warmup_epochs=100)
            tuner = fxstn.tune(
                model, optimizer, F.cross_entropy, loader, valid, [hp.WeightDecay()], epoch_steps=5, hyper=later
            )
        losses.append([])
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert len(tuner.history) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_loss_that_calls_the_model_is_told_where_to_do_so() -> None:
    """Its second forward is none of the network's graphs, as in a gradient penalty."""
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer = sgd(model)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + model(torch.ones(2, 8)).square().mean()

    fxstn.tune(model, optimizer, loss_fn, loader, valid, [hp.Dropout()], **QUICK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    (text,) = {str(warning.message) for warning in caught if "calls the model" in str(warning.message)}
    assert "compute it in the model's forward" in text
    assert sum("calls the model" in str(warning.message) for warning in caught) == 1


def test_a_loss_that_differentiates_with_respect_to_inputs_is_told_where_to_do_so() -> None:
    """As in the training of physics-informed networks."""
    model, (loader, valid) = mlp(0.3), loaders()
    optimizer = sgd(model)

    def loss_fn(output: Tensor, batch: list[Tensor]) -> Tensor:
        (slope,) = torch.autograd.grad(output.sum(), batch[0], create_graph=True)
        return slope.square().mean()

    fxstn.tune(model, optimizer, loss_fn, loader, valid, [hp.Dropout()], forward=lambda m, b: (m(b[0]), b), **QUICK)
    x, _ = next(iter(loader))
    x = x.clone().requires_grad_()
    loss_fn(model(x), [x]).backward()
    with pytest.raises(ValueError, match=r"take derivatives with respect to inputs in the model's forward"):
        optimizer.step()
