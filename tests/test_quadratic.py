"""Law 8: on a quadratic inner problem Θ is the best-response Jacobian, and λ goes where a closed-form search goes.

One run of λ; all starts of all data sets with `pytest -m nightly`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxstn
from benchmarks import ridge
from fxstn import hp
from fxstn.ops.response import frozen, parameter_changes

LOW, HIGH = 1e-4, 1e3
QUICK = [("diabetes", 0.1)]
SHORT = ridge.Settings(
    copies=64, valid_copies=32, warmup_epochs=30, phases=((60, 1.0), (20, 0.5), (20, 0.2), (15, 0.1))
)
# Multiplicities of a three-node Gauss–Hermite rule for N(0, 1): exact for polynomials up to degree 5.
NODES = torch.tensor([0.0] * 4 + [math.sqrt(3.0), -math.sqrt(3.0)], dtype=torch.float64)


@pytest.fixture(params=list(ridge.SPLITS))
def problem(request: pytest.FixtureRequest) -> Iterator[ridge.Problem]:
    """A ridge problem; the UCI sets only where FXSTN_DATA says where they are."""
    root = os.environ.get("FXSTN_DATA")
    if request.param != "diabetes" and root is None:
        pytest.skip(reason=f"{request.param} needs the variable FXSTN_DATA")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ridge.load_problem(request.param, root)
    torch.set_num_threads(threads)


def linear_stn(problem: ridge.Problem, weight_decay: float, scale: float, method: str) -> fxstn.SelfTuningNetwork:
    """A linear model with w₀ = w*(λ) exactly, float64."""
    model = nn.Linear(problem.X.shape[1], 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(ridge.best_weights(problem, weight_decay))
    specs = [hp.WeightDecay(init=weight_decay, low=LOW, high=HIGH, scale=scale)]
    return fxstn.transform(model, specs, method=method, response="structured")


def fit_response(stn: fxstn.SelfTuningNetwork, problem: ridge.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minimise the response objective over Θ alone, its expectation over ε by quadrature: each example meets each node."""
    X, y = problem.X.repeat_interleave(len(NODES), 0), problem.y.repeat_interleave(len(NODES), 0)
    epsilon = (stn.hparams.scale.detach() * NODES[:, None]).repeat(len(problem.X), 1)
    monkeypatch.setattr(stn.hparams, "sample", lambda n, generator=None: epsilon[:n])
    variance = stn.hparams.scale.item() ** 2
    optimizer = torch.optim.LBFGS(
        stn.response_parameters(), max_iter=500, history_size=20, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fxstn.response_loss(stn, nn.MSELoss(), X, y) / variance
        loss.backward()
        return loss

    stn.train()
    optimizer.step(closure)


def change(stn: fxstn.SelfTuningNetwork) -> Tensor:
    """Θ as a column, (d,): the change of w per unit of the unconstrained λ."""
    with torch.no_grad():
        return (stn.best_response(torch.ones(1, dtype=torch.float64))["weight"] - stn.model.weight).squeeze(0)


def slope(stn: fxstn.SelfTuningNetwork) -> Tensor:
    """Derivative of the constrained λ in the unconstrained coordinate, (1,)."""
    unconstrained = stn.hparams.unconstrained.detach()
    return torch.func.jvp(stn.hparams.bijection, (unconstrained,), (torch.ones_like(unconstrained),))[1]


@pytest.mark.parametrize("method", ["delta", "centered"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_response_converges_to_the_best_response_jacobian(
    problem: ridge.Problem, factor: float, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_decay = factor * ridge.optimal_weight_decay(problem)
    stn = linear_stn(problem, weight_decay, 0.01, method)
    fit_response(stn, problem, monkeypatch)

    unconstrained, step = stn.hparams.unconstrained.detach(), 1e-4
    up, down = (ridge.best_weights(problem, stn.hparams.bijection(unconstrained + s).item()) for s in (step, -step))
    witness = (up - down) / (2 * step)
    mixed = slope(stn) * ridge.best_weights(problem, weight_decay)  # ∂²L_T/∂w∂λ
    exact = -torch.linalg.solve(ridge.hessian(problem, weight_decay), mixed)
    assert (witness - exact).norm() < 1e-6 * exact.norm()
    assert (change(stn) - witness).norm() < 0.01 * witness.norm()


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_hypergradient_at_the_jacobian_is_the_derivative_of_the_validation_loss(
    problem: ridge.Problem, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_decay = factor * ridge.optimal_weight_decay(problem)
    stn = linear_stn(problem, weight_decay, 0.01, "delta")
    unconstrained, step = stn.hparams.unconstrained.detach().clone(), 1e-4

    def valid_loss(shift: float) -> float:
        return ridge.best_valid_loss(problem, stn.hparams.bijection(unconstrained + shift).log().item())

    jacobian = -torch.linalg.solve(
        ridge.hessian(problem, weight_decay),
        slope(stn) * ridge.best_weights(problem, weight_decay),
    )
    with torch.no_grad():
        response = stn.response.get_submodule("weight")
        response.U.fill_(1.0)
        response.R.copy_(jacobian)
    monkeypatch.setattr(stn.hparams, "sample", lambda n, generator=None: torch.zeros(n, 1, dtype=torch.float64))
    stn.train()
    fxstn.hyper_loss(stn, nn.MSELoss(), problem.X_valid, problem.y_valid).backward()
    witness = (valid_loss(step) - valid_loss(-step)) / (2 * step)
    assert stn.hparams.unconstrained.grad.item() == pytest.approx(witness, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "factor", "settings"),
    [
        *(pytest.param(name, factor, SHORT) for name, factor in QUICK),
        *(pytest.param(name, factor, ridge.Settings(), marks=pytest.mark.nightly)
          for name in ridge.SPLITS for factor in ridge.STARTS),
    ],
    indirect=["problem"],
)  # fmt: skip
def test_runner_reaches_the_weight_decay_of_the_closed_form_search(
    problem: ridge.Problem, factor: float, settings: ridge.Settings
) -> None:
    optimum = ridge.optimal_weight_decay(problem)
    trajectory = ridge.tune(problem, "delta", factor * optimum, settings)
    assert abs(math.log(trajectory[-1] / optimum)) < 0.05


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("method", "response"),
    [("stn", "structured"), *((m, r) for m in ("delta", "centered") for r in ("structured", "scaled"))],
)
def test_penalty_of_the_response_is_that_of_materialised_weights(response: str, shared: bool, method: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    specs = [hp.WeightDecay("*", init=0.3, low=1e-3, high=10.0, shared=shared), hp.Dropout("0", init=0.2)]
    stn = fxstn.transform(model, specs, method=method, response=response)
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.normal_()
        stn.hparams.unconstrained.normal_()
    batch, h = 4, len(stn.hparams)
    assert h == (2 if shared else 4)
    epsilon = torch.randn(batch, h, dtype=torch.float64)

    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    column = {name: stn.hparams.names.index("weight_decay" if shared else f"{name[0]}.weight_decay") for name in names}
    uncentred = stn.hparams.unconstrained.detach() if method == "stn" else 0
    general = dict(stn.model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for row in epsilon:
        strengths = stn.hparams(row)
        with frozen(() if method == "stn" else stn.general_parameters()):
            changes = parameter_changes(stn.response, stn.model, row + uncentred)
        for name in names:
            base = general[name] if method == "stn" else general[name].detach()
            total = total + 0.5 * strengths[column[name]] * (base + changes[name]).square().sum() / batch

    penalty = stn.penalty(epsilon)
    assert abs(penalty - total) < 1e-12 * total
    parameters = [*stn.response_parameters(), *stn.general_parameters()]
    structured = torch.autograd.grad(penalty, parameters, allow_unused=True)
    materialised = torch.autograd.grad(total, parameters, allow_unused=True)
    assert [gradient is None for gradient in structured] == [gradient is None for gradient in materialised]
    pairs = [pair for pair in zip(structured, materialised, strict=True) if pair[0] is not None]
    assert pairs
    for gradient, expected in pairs:
        assert (gradient - expected).norm() <= 1e-12 * expected.norm()
