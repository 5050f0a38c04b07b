"""Every rule holds for complex numbers where torch takes them, also where some of the arguments are real."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxstn
from fxstn import hp
from fxstn.ir.tangents import ZERO
from tests.cases import CASES, FALLBACK_CASES, Case
from tests.test_rules import Prepared, close, difference, name

COMPLEX, REAL = torch.complex128, torch.float64
# torch casts its result to the type of a real input, and real statistics to that of a complex one
REAL_INPUT = {"F.rms_norm", "F.instance_norm"}


def drawn(case: Case, kinds: list[torch.dtype]) -> Prepared:
    """A case whose tensors have these types, complex ones in all quadrants where the domain is."""
    prepared, generator = Prepared(case), torch.Generator().manual_seed(3)
    low, high = case.domain

    def one(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        parts = (low + (high - low) * torch.rand((2, *shape), generator=generator, dtype=REAL)).unbind()
        return torch.complex(*parts) if kind.is_complex else parts[0]

    prepared.tensors = [one(shape, kind) for shape, kind in zip(case.shapes, kinds, strict=True)]
    prepared.directions = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for x in map(prepared.tensors.__getitem__, prepared.varying)
    ]
    return prepared


def transposed(prepared: Prepared) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]] | None:
    """(cotangents of all float results, their gradients in the varying tensors) by torch; None where it takes none of it."""
    primals = tuple(x.clone().requires_grad_() for x in prepared.primals())
    try:
        values = [x for x in tree_leaves(prepared.function(*primals)) if x.requires_grad]
        cotangents = [torch.randn_like(x) for x in values]
        return cotangents, torch.autograd.grad(values, primals, cotangents, allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, AssertionError):
        return None


def taken() -> Iterator[tuple[str, Prepared, tuple]]:
    """Every case of the table with each choice of complex arguments that torch differentiates."""
    for case in (*CASES, *FALLBACK_CASES):
        if case.varying == () or case.integer or case.imaginary:
            continue
        count = len(case.shapes)
        for some in itertools.product((COMPLEX, REAL), repeat=min(count, 3)):
            kinds = [*some, *[some[-1]] * (count - len(some))]
            if REAL in kinds and name(case) in REAL_INPUT:
                continue
            prepared = drawn(case, kinds)
            if COMPLEX in kinds and (expected := transposed(prepared)) is not None:
                yield f"{name(case)} {case.args} {case.kwargs} of {kinds}", prepared, expected


def check(prepared: Prepared, cotangents: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> None:
    directions = [d.clone().requires_grad_() for d in prepared.directions]
    y, dy = prepared.rule(directions)
    close(y, prepared.function(*prepared.primals()), 1e-12)
    step, pairs = 1e-6, list(zip(prepared.primals(), prepared.directions, strict=True))
    slope = difference(*(prepared.function(*(x + s * step * d for x, d in pairs)) for s in (1, -1)), step)
    close(dy, slope, 1e-5)  # coarse near a pole, as that of a sigmoid
    changes = [leaf for leaf in tree_leaves(dy) if leaf is not ZERO and leaf.requires_grad]
    close(
        torch.autograd.grad(changes, directions, cotangents, allow_unused=True, materialize_grads=True), gradients, 1e-9
    )


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
def test_every_rule_holds_for_the_complex_numbers_that_torch_takes():
    checked, wrong = 0, []
    for label, prepared, expected in taken():
        checked += 1
        try:
            check(prepared, *expected)
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__} {str(error)[:80]}")
    assert checked > 300
    assert not wrong


class Complex(nn.Module):
    """A function of real weights times a complex constant."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function
        self.register_buffer("factor", torch.randn(3, dtype=torch.complex64))

    def forward(self, x):
        return self.function(self.layer(x), self.factor)


@pytest.mark.parametrize("trace", ["fx", "live"])
@pytest.mark.parametrize(
    "function",
    [
        lambda h, c: torch.linalg.vector_norm(h * c, dim=1) + torch.var(h * c, 1),
        lambda h, c: torch.view_as_real(torch.acosh(h * c) + torch.tanh(h * c).sigmoid()),
        lambda h, c: torch.view_as_real((h * c) ** (1 + 2j) + (2 + h * h) ** c + 2 ** (h * c) + c**h),
        lambda h, c: torch.view_as_real(torch.constant_pad_nd(h * c, (1, 1), 1 + 2j)),
        lambda h, c: torch.view_as_real(h + c),
        lambda h, c: nn.functional.l1_loss(h * c, c.expand_as(h), reduction="none"),
    ],
    ids=["norms", "functions", "powers", "pad", "sum", "loss"],
)
def test_a_network_with_complex_values_has_the_tangent_of_the_original(function, trace):
    torch.manual_seed(0)
    report = fxstn.verify(Complex(function), torch.randn(5, 4), hparams=[hp.WeightDecay()], trace=trace)
    assert report.ok, str(report)


def test_the_gradients_of_the_response_pass_through_a_norm_of_complex_values():
    model = Complex(lambda h, c: torch.linalg.vector_norm(h * c, dim=1))
    stn = fxstn.transform(model, [hp.WeightDecay()], example_inputs=torch.randn(5, 4))
    _, dy = stn.pushforward(torch.randn(5, 4), delta=torch.ones(1))
    assert dy.dtype == torch.float32
    gradients = torch.autograd.grad(dy.sum(), list(stn.response_parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in gradients)
