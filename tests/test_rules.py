"""Laws 2 and 7: every rule against torch.func.jvp and a central difference; the table is complete."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

import fxstn
from fxstn import hp
from fxstn.ir.errors import operation_name
from fxstn.ir.tangents import ZERO, all_zero
from fxstn.rules import RULES, NoRule, apply_rule
from fxstn.rules.registry import register
from tests.cases import ALIGNED, CASES, FALLBACK_CASES, SPECIAL, ZERO_CASES, Case, X

DISTANCE = 1e-2  # of random points from a kink
LENGTHS_ON_THE_CPU = {torch._pack_padded_sequence, torch._pad_packed_sequence}


def draw(shape, case: Case, generator: torch.Generator) -> torch.Tensor:
    low, high = case.domain
    kind = torch.complex128 if case.imaginary else torch.float64
    x = low + (high - low) * torch.rand(shape, generator=generator, dtype=kind)
    if case.integer:
        return x.round().long()
    for kink in case.away:
        x = torch.where((x - kink).abs() < DISTANCE, torch.full_like(x, kink + 2 * DISTANCE), x)
    return x


def dense(results):
    """Sparse matrices as dense ones, which can be compared."""
    sparse = lambda x: isinstance(x, torch.Tensor) and x.layout is not torch.strided  # noqa: E731
    return tree_map(lambda x: x.to_dense() if sparse(x) else x, results)


class Prepared:
    """A case with random primals and tangents on a device. Operations that draw find the same seed each time."""

    def __init__(self, case: Case, seed: int = 0, device: str = "cpu"):
        generator = torch.Generator().manual_seed(seed)
        self.case, self.device = case, device
        self.tensors = [draw(shape, case, generator).to(device) for shape in case.shapes]
        varying = range(len(self.tensors)) if case.varying is None else case.varying
        self.varying = list(varying)
        kind = torch.complex128 if case.imaginary else torch.float64
        self.directions = [
            torch.randn(self.tensors[i].shape, generator=generator, dtype=kind).to(device) for i in self.varying
        ]
        self.directions = [case.possible(direction) for direction in self.directions]

    def fixed(self, leaf):
        """What a case has beside its tensors, on the device."""
        moves = isinstance(leaf, torch.Tensor) and self.case.function not in LENGTHS_ON_THE_CPU
        return leaf.to(self.device) if moves else leaf

    def function(self, *varying):
        tensors = list(self.tensors)
        for i, value in zip(self.varying, varying, strict=True):
            tensors[i] = value
        args, kwargs = self.case.placed(tensors, self.fixed)
        torch.manual_seed(0)
        return dense(self.case.function(*args, **kwargs))

    def rule(self, directions, tensors=None, rest=None):
        """(y, dy); directions: one per varying tensor, or ZERO. rest: what becomes of other arguments."""
        by_position = dict(zip(self.varying, directions, strict=True))
        changes = [by_position.get(i, ZERO) for i in range(len(self.tensors))]
        args, kwargs = self.case.placed(self.tensors if tensors is None else tensors, rest or self.fixed)
        tangents, named = self.case.placed(changes, rest=lambda _: ZERO)
        torch.manual_seed(0)
        return dense(apply_rule(self.case.function, tangents, args, kwargs, named))

    def primals(self):
        return tuple(self.tensors[i] for i in self.varying)


def close(a, b, tolerance):
    """Structures of tensors that agree; ZERO, None and Python values stand for a tangent of zero."""
    leaves = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    assert any(isinstance(x, torch.Tensor) for x, _ in leaves)
    for x, y in leaves:
        if not isinstance(x, torch.Tensor):
            assert not isinstance(y, torch.Tensor) or not y.any()
            continue
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        kind = torch.promote_types(x.dtype, torch.float32)
        assert (x.to(kind) - y.to(kind)).norm() <= tolerance * (1 + y.to(kind).norm())


def difference(a, b, step):
    """The central difference of two results; zeros where they are not continuous."""
    return tree_map(lambda x, y: (x - y) / (2 * step) if x.dtype.is_floating_point or x.is_complex() else x * 0, a, b)


def check_rule(case: Case, seed: int = 0, device: str = "cpu"):
    prepared = Prepared(case, seed, device)
    y, dy = prepared.rule(prepared.directions)
    close(y, prepared.function(*prepared.primals()), 1e-12)
    step = 1e-6
    moved = [
        prepared.function(*(x + s * step * d for x, d in zip(prepared.primals(), prepared.directions, strict=True)))
        for s in (1, -1)
    ]
    close(dy, difference(*moved, step), 1e-7)
    if case.forward and device == "cpu":  # cuDNN's kernels have no forward mode
        _, expected = torch.func.jvp(prepared.function, prepared.primals(), tuple(prepared.directions))
        close(dy, expected, 1e-10)


def name(case: Case) -> str:
    return operation_name(case.function)


def count_of_tangents(case: Case) -> int:
    return len(case.shapes if case.varying is None else case.varying)


VARYING = [case for case in (*CASES, *FALLBACK_CASES) if case.varying != ()]
NAMES = [f"{i}-{name(case)}" for i, case in enumerate(VARYING)]
every_varying_case = pytest.mark.parametrize("case", VARYING, ids=NAMES)


def most_at_night(cases):
    """By day the first case of each operation whose tangent reads the primal values; a test at night has all."""
    seen, result = set(), []
    for case in cases:
        kind = RULES[case.function].kind if case.function in RULES else "fallback"
        at_night = case.function in seen or kind in ("linear", "additive", "bilinear")
        seen.add(case.function)
        result.append(pytest.param(case, id=name(case), marks=[pytest.mark.nightly] * at_night))
    return result


@every_varying_case
def test_a_rule_equals_forward_mode_and_a_central_difference(case):
    check_rule(case)


@pytest.mark.parametrize("case", [case for case in VARYING if not case.forward], ids=name)
def test_torch_has_no_forward_mode_where_a_case_says_so(case):
    """It raises, or, for operators of other libraries, answers zero, where the rule does not."""
    prepared = Prepared(case)
    try:
        _, dy = torch.func.jvp(prepared.function, prepared.primals(), tuple(prepared.directions))
    except (NotImplementedError, RuntimeError):
        dy = None
    assert dy is None or not any(leaf.any() for leaf in tree_leaves(dy))
    assert any(leaf.any() for leaf in tree_leaves(prepared.rule(prepared.directions)[1]) if leaf is not ZERO)


@every_varying_case
def test_a_tangent_is_linear_in_the_direction(case):
    prepared = Prepared(case)
    other = [torch.randn_like(d) for d in prepared.directions]
    mixed = [2 * a - 3 * b for a, b in zip(prepared.directions, other, strict=True)]
    parts = prepared.rule(prepared.directions)[1], prepared.rule(other)[1]
    combined = tree_map(lambda a, b: a if a is ZERO else 2 * a - 3 * b, *parts)
    close(prepared.rule(mixed)[1], combined, 1e-10)


@pytest.mark.parametrize("case", [case for case in VARYING if case.backward], ids=name)
def test_the_gradient_with_respect_to_a_tangent_is_the_transpose(case):
    """⟨g, J d⟩ must have gradient Jᵀ g in d: compare with reverse mode through the function itself."""
    prepared = Prepared(case)
    directions = [d.clone().requires_grad_() for d in prepared.directions]
    dy = list(tree_leaves(prepared.rule(directions)[1]))
    dependent = [leaf is not ZERO and leaf.requires_grad for leaf in dy]
    assert any(dependent)
    changes = list(itertools.compress(dy, dependent))
    cotangents = [torch.randn_like(leaf) for leaf in changes]
    settings = {"grad_outputs": cotangents, "allow_unused": True, "materialize_grads": True}
    # the transpose first: instance norm of torch 2.9 writes into its statistics
    found = torch.autograd.grad(changes, directions, **settings)
    primals = tuple(x.clone().requires_grad_() for x in prepared.primals())
    values = tree_leaves(prepared.function(*primals))
    assert len(values) == len(dy)
    expected = torch.autograd.grad(list(itertools.compress(values, dependent)), primals, **settings)
    close(found, expected, 1e-10)


def change_in_the_primal(prepared, directions, offset=None, record=False):
    """⟨g, dy⟩ at the primal values + offset, and its gradient in them."""
    primals = [x.detach().clone() for x in prepared.primals()]
    if offset is not None:
        primals = [x + o for x, o in zip(primals, offset, strict=True)]
    tensors = list(prepared.tensors)
    for i, x in zip(prepared.varying, primals, strict=True):
        tensors[i] = x.requires_grad_(offset is None)
    generator = torch.Generator().manual_seed(1)
    leaves = [leaf for leaf in tree_leaves(prepared.rule(directions, tensors)[1]) if leaf is not ZERO]
    leaves = [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    products = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).conj()).sum().real for leaf in leaves
    ]
    value = torch.stack(products).sum()
    if offset is not None:
        return value
    value = value + 0 * sum(x.sum().real for x in primals)  # where no part of the tangent reads them
    return torch.autograd.grad(value, primals, create_graph=record, materialize_grads=True)


@pytest.mark.parametrize("case", most_at_night(case for case in VARYING if case.twice))
def test_a_tangent_is_differentiated_in_the_primal_values_and_then_in_the_direction(case):
    """As hp.JacobianNorm does. The first by a central difference, the second exactly: the square is quadratic."""
    prepared, step = Prepared(case), 1e-6
    along = [case.possible(torch.randn_like(d)) for d in prepared.directions]
    product = lambda a, b: sum((x.conj() * y).sum().real for x, y in zip(a, b, strict=True))  # noqa: E731
    shifted = lambda values, size: [v + size * a for v, a in zip(values, along, strict=True)]  # noqa: E731
    moves = [shifted([torch.zeros_like(a) for a in along], size) for size in (step, -step)]
    expected = torch.sub(*(change_in_the_primal(prepared, prepared.directions, move) for move in moves)) / (2 * step)
    directions = [d.clone().requires_grad_() for d in prepared.directions]
    gradients = change_in_the_primal(prepared, directions, record=True)
    assert product(gradients, along).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    square = lambda values: product(values, values)  # noqa: E731
    ends = [square(change_in_the_primal(prepared, shifted(prepared.directions, size))) for size in (1, -1)]
    total = square(gradients) + 0 * sum(d.sum().real for d in directions)
    found = product(torch.autograd.grad(total, directions, materialize_grads=True), along)
    assert found.item() == pytest.approx((ends[0] - ends[1]).item() / 2, rel=1e-9, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("case", [case for case in VARYING if not case.twice], ids=name)
def test_what_torch_cannot_differentiate_again_is_refused(case):
    prepared = Prepared(case)
    directions = [d.clone().requires_grad_() for d in prepared.directions]
    with pytest.raises(RuntimeError, match=r"not implemented|not supported|nan"), torch.autograd.detect_anomaly():
        sum(x.square().sum() for x in change_in_the_primal(prepared, directions, record=True)).backward()


@pytest.mark.parametrize("case", [case for case in VARYING if count_of_tangents(case) > 1], ids=name)
def test_each_mask_of_zeros_equals_the_rule_with_zeros_written_out(case):
    prepared = Prepared(case)
    count = len(prepared.directions)
    masks = [[*mask, *[False] * (count - 3)] for mask in itertools.product((True, False), repeat=min(count, 3))]
    for on in (mask for mask in masks if any(mask) and not all(mask)):
        symbolic = [d if keep else ZERO for d, keep in zip(prepared.directions, on, strict=True)]
        written = [d if keep else torch.zeros_like(d) for d, keep in zip(prepared.directions, on, strict=True)]
        dy, expected = prepared.rule(symbolic)[1], prepared.rule(written)[1]
        if dy is ZERO:
            assert all(not leaf.any() for leaf in tree_leaves(expected))
        else:
            close(dy, expected, 1e-12)


@every_varying_case
def test_a_rule_on_proxies_emits_what_it_computes_on_tensors(case):
    prepared = Prepared(case)
    graph, inputs = fx.Graph(), []
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def lifted(value):
        if not isinstance(value, torch.Tensor):
            return value
        inputs.append(value)
        return fx.Proxy(graph.placeholder(f"x{len(inputs)}"), tracer)

    tensors, directions = [lifted(x) for x in prepared.tensors], [lifted(d) for d in prepared.directions]
    result = prepared.rule(directions, tensors, rest=lifted)
    graph.output(map_aggregate(result, lambda leaf: leaf.node if isinstance(leaf, fx.Proxy) else None))
    torch.manual_seed(0)
    close(dense(fx.GraphModule({}, graph)(*inputs)), prepared.rule(prepared.directions), 1e-12)


@pytest.mark.parametrize("case", [c for c in (*CASES, *ZERO_CASES) if c.function is not torch.Tensor.cuda], ids=name)
def test_zero_in_gives_zero_out(case):  # without torch.Tensor.cuda, which needs a device
    prepared = Prepared(case)
    assert all_zero(prepared.rule([ZERO] * len(prepared.directions))[1])


@pytest.mark.parametrize("case", ZERO_CASES, ids=name)
def test_a_zero_rule_cuts_the_tangent(case):
    prepared = Prepared(case)
    assert prepared.rule(prepared.directions)[1] is ZERO


def test_the_table_of_rules_and_the_table_of_cases_have_the_same_keys():
    assert {case.function for case in [*CASES, *ZERO_CASES]} == set(RULES)


def test_a_second_rule_for_one_operation_is_refused():
    with pytest.raises(ValueError, match="already has a"):
        register(torch.exp, "linear", lambda *_: None)


def test_an_attribute_that_is_not_followed_is_refused():
    with pytest.raises(NoRule, match=r"\.grad_fn"):
        apply_rule(getattr, (torch.ones(2), ZERO), (torch.ones(2), "grad_fn"), {})


def test_the_tangent_of_batch_norm_in_training_mode_is_torchs_own():
    x, weight, bias = torch.randn(6, 3, 4).double(), torch.randn(3).double(), torch.randn(3).double()
    dx = torch.randn_like(x).requires_grad_()
    arguments = (x, None, None, weight, bias, True, 0.0, 1e-5)
    y, dy = apply_rule(F.batch_norm, (dx, *[ZERO] * 7), arguments, {})
    function = lambda v: F.batch_norm(v, *arguments[1:])  # noqa: E731
    _, expected = torch.func.jvp(function, (x,), (dx.detach(),))
    close((y, dy), (function(x), expected), 1e-10)
    cotangent = torch.randn_like(x)
    _, pullback = torch.func.vjp(function, x)
    close(torch.autograd.grad(dy, dx, cotangent), pullback(cotangent), 1e-10)


def test_attention_with_nothing_to_attend_to_has_no_nan():
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    nothing = torch.full((3, 3), -torch.inf, dtype=torch.float64)
    change = torch.randn_like(q).requires_grad_()
    for mask in (nothing, nothing == 0):
        y, dy = apply_rule(F.scaled_dot_product_attention, (change, ZERO, change, ZERO), (q, k, v, mask), {})
        close(y, F.scaled_dot_product_attention(q, k, v, mask), 1e-12)
        assert not y.any()
        assert not dy.any()
        assert not torch.autograd.grad(dy.sum(), change)[0].any()


def check_transpose(prepared):
    """At a point, the tangent is the transpose of torch's own backward, whatever that makes of ties and of divisors of 0.

    Entries at which torch's gradient is not finite do not count.
    """
    settings = {"allow_unused": True, "materialize_grads": True}
    primals = tuple(x.clone().requires_grad_() for x in prepared.primals())
    try:
        values = tree_leaves(prepared.function(*primals))
    except (RuntimeError, ValueError):  # no inverse, no logarithm: torch has no value there
        values = [torch.full((1,), torch.nan, requires_grad=True)]
    varying = [isinstance(value, torch.Tensor) and value.requires_grad for value in values]
    values = list(itertools.compress(values, varying))
    if any(value.isnan().any() for value in values):
        return False
    cotangents = [torch.randn_like(value) for value in values]
    expected = torch.autograd.grad(values, primals, cotangents, **settings)
    directions = [d.clone().requires_grad_() for d in prepared.directions]
    dy = list(itertools.compress(tree_leaves(prepared.rule(directions)[1]), varying))
    on = [leaf is not ZERO and leaf.requires_grad for leaf in dy]
    changes, weights = (list(itertools.compress(x, on)) for x in (dy, cotangents))
    found = torch.autograd.grad(changes, directions, weights, **settings) if changes else [0 * d for d in directions]
    product = lambda a, b: sum((x.conj() * y).sum().real for x, y in zip(a, b, strict=True))  # noqa: E731
    for gradient, of_torch in zip(found, expected, strict=True):
        agrees = torch.isclose(gradient, of_torch, rtol=1e-9, atol=1e-9)
        assert (agrees | ~of_torch.isfinite()).all(), f"{gradient}\nof torch: {of_torch}"
    if all(gradient.isfinite().all() for gradient in expected):
        change, of_torch = (
            torch.as_tensor(product(*pair)).item() for pair in ((weights, changes), (expected, prepared.directions))
        )
        assert change == pytest.approx(of_torch, rel=1e-9, abs=1e-9)
    return True


def special_points(x, case):
    """Points where a divisor may be zero, a maximum shared, a kink met, in place of the numbers drawn."""
    place = torch.arange(x.numel()).view(x.shape)
    alternating = torch.where(place % 2 == 0, 0, x)
    if x.dim():
        alternating[:1], alternating[1:2] = 0, 0.5  # a row of zeros, a constant one
    ties = x.sgn() if x.is_complex() else x.round()
    for i, kink in enumerate(case.away):
        ties = torch.where(place % (1 + len(case.away)) == i, kink, ties)
    infinite = torch.where(place % 3 == 0, -torch.inf, torch.where(place % 5 == 1, torch.inf, x))
    points = dict(zip(SPECIAL, (torch.zeros_like(x), alternating, ties, infinite), strict=True))
    return [point for name, point in points.items() if name not in case.without]


@pytest.mark.parametrize("case", most_at_night(case for case in VARYING if case.backward and case.without != SPECIAL))
def test_the_tangent_is_the_transpose_of_torchs_gradient_at_special_points(case):
    prepared, checked = Prepared(case), []
    for tensors in zip(*(special_points(x, case) for x in prepared.tensors), strict=True):
        prepared.tensors = list(tensors)
        checked.append(check_transpose(prepared))
    assert any(checked)


@pytest.mark.parametrize("rank", range(4))
def test_the_tangent_of_a_determinant_is_right_where_the_matrix_is_singular(rank):
    """A determinant of four rows is a polynomial of degree 4 in the step, which five values determine."""
    A = (torch.randn(2, 4, rank) @ torch.randn(2, rank, 4)).double()
    A[0, 0] = 0.0
    direction = torch.randn(2, 4, 4).double()
    value = lambda step: torch.linalg.det(A + step * direction)  # noqa: E731
    slope = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / 12
    _, found = apply_rule(torch.linalg.det, (direction,), (A,), {})
    torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-9)


NOWHERE, INF = torch.full((3, 4), -torch.inf, dtype=torch.float64), float("inf")


@pytest.mark.parametrize(
    ("function", "x", "args"),
    [
        *((operator.pow, [0.0, 2.0], (p,)) for p in (0, 1, 2, 0.5, 1.5, 3.0)),
        *((operator.pow, [0.0, 2.0, 0.0], (torch.tensor([p, p, 0.0]).double(),)) for p in (0.0, 1.0, 2.5)),
        (torch.xlogy, [0.0, 2.0], (0.0,)),
        (torch.xlogy, [0.0, 2.0], (torch.tensor([0.0, 1.0]).double(),)),
        (torch.logaddexp, [INF, -INF, INF], (torch.tensor([1.0, 2.0, -INF]).double(),)),
        (torch._safe_softmax, [[-INF, -INF], [0.0, -INF]], (1,)),
        (torch.logsumexp, [[-INF, 1.0], [-INF, -INF]], (1,)),
        (
            F.scaled_dot_product_attention,
            [[0.0] * 4] * 3,
            (torch.ones(3, 4).double(), torch.ones(3, 4).double(), NOWHERE[:, :3]),
        ),
        (torch.cdist, [[1.0, 2.0], [0.0, 0.0]], (torch.tensor([[1.0, 2.0]]).double(),)),
        (F.pairwise_distance, [[1.0, 2.0]], (torch.tensor([[1.0, 2.0]]).double(), 2.0, 0.0)),
        (F.cosine_similarity, [[0.0, 0.0], [1.0, 0.0]], (torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double(),)),
        (torch.norm, [[0.0, 0.0], [1.0, 0.0]], ("fro", 1)),
        (torch.linalg.vector_norm, [[0.0, 0.0], [1.0, 0.0]], (3.0, 1)),
        (torch.median, [1.0, 1.0, 2.0, 1.0], ()),
        (torch.max, [[1.0, 1.0, 0.0]], (1,)),
        (torch.cumprod, [0.0, 2.0, 0.0, 3.0, 4.0], (0,)),
    ],
    ids=lambda value: operation_name(value) if callable(value) else "",
)
def test_the_tangent_is_the_transpose_of_torchs_gradient_at_a_named_point(function, x, args):
    x = torch.tensor(x, dtype=torch.float64)
    prepared = Prepared(Case(function, (x.shape,), args))
    prepared.tensors = [x]
    assert check_transpose(prepared)


def test_the_hard_gumbel_softmax_has_the_tangent_of_the_soft_one():
    x, dx = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    results = []
    for hard in (True, False):
        torch.manual_seed(0)
        results.append(apply_rule(F.gumbel_softmax, (dx,), (x,), {"hard": hard}))
    (y, dy), (soft, expected) = results
    close(dy, expected, 1e-12)
    close(y, F.one_hot(soft.argmax(1), 4).double(), 1e-12)


BOX = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])


@pytest.mark.parametrize(
    ("function", "varying", "args", "reason"),
    [
        (torchvision.ops.roi_align, 1, (torch.rand(1, 2, 4, 4), BOX, 2), "boxes vary"),
        (torch.ops.torchvision.roi_pool, 1, (torch.rand(1, 2, 4, 4), BOX, 1.0, 2, 2), "boxes vary"),
        (torch.Tensor.item, 0, (torch.ones(()),), "Python number"),
        (torch.Tensor.tolist, 0, (torch.ones(2),), "Python number"),
        (F.scaled_dot_product_attention, 0, (*[torch.rand(1, 2, 3)] * 3, None, 0.5), "dropout"),
        (torch.norm, 0, (torch.rand(3, 3), "nuc"), "nuclear"),
        (torch.scatter, 0, (torch.rand(3), 0, torch.tensor([1]), 2.0), "reduction"),
    ],
    ids=lambda value: operation_name(value) if callable(value) else "",
)
def test_what_has_no_tangent_is_refused_with_the_reason(function, varying, args, reason):
    tangents = tuple(torch.ones_like(x) if i == varying else ZERO for i, x in enumerate(args))
    kwargs = {"reduce": "multiply"} if function is torch.scatter else {}
    with pytest.raises(NoRule, match=reason):
        apply_rule(function, tangents, args, kwargs)


WITH_RULE = [case for case in CASES if case.varying != ()]
OWN = [case for case in WITH_RULE if RULES[case.function].kind not in ("linear", "additive", "bilinear")]


@pytest.mark.parametrize("case", OWN, ids=name)
def test_the_gradient_with_respect_to_a_tangent_passes_gradcheck(case):
    prepared = Prepared(case)

    def changes(*directions):
        leaves = [leaf for leaf in tree_leaves(prepared.rule(directions)[1]) if leaf is not ZERO]
        return tuple(leaf for leaf in leaves if leaf.requires_grad)

    directions = tuple(d.requires_grad_() for d in prepared.directions)
    assert torch.autograd.gradcheck(changes, directions, fast_mode=True)


def needs_float64(case: Case) -> bool:
    """Whether a case names its type, or is complex."""
    return case.imaginary or any(value is torch.float64 for value in (*case.args, *case.kwargs.values()))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in WITH_RULE if not needs_float64(case)], ids=name)
def test_a_tangent_has_the_type_and_the_shape_of_its_primal(case, precision):
    """In another precision than the one that everything else here is computed in."""
    prepared = Prepared(case)

    def narrowed(value):
        return value.to(precision) if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value

    directions = [narrowed(d) for d in prepared.directions]
    try:
        args, kwargs = case.placed([narrowed(x) for x in prepared.tensors], narrowed)
        case.function(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if precision is torch.float32:
            raise
        pytest.skip(reason=f"torch has no {name(case)} in {precision}: {error}")
    y, dy = prepared.rule(directions, [narrowed(x) for x in prepared.tensors], rest=narrowed)
    pairs = [pair for pair in zip(tree_leaves(y), tree_leaves(dy), strict=True) if pair[1] is not ZERO]
    assert pairs
    for value, change in pairs:
        assert change.shape == value.shape
        assert change.dtype == value.dtype


Drawn = Callable[[int, int, int], Case]
DRAWN: list[Drawn] = [
    *(
        lambda b, n, c, f=f: Case(f, ((b, n, c), (c,)), domain=(0.3, 2.0))
        for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.atan2, torch.maximum)
    ),
    lambda b, n, c: Case(torch.where, ((b, n, c), (n, 1)), (torch.arange(n)[:, None] % 2 == 0, X, X)),
    lambda b, n, c: Case(torch.einsum, ((b, n, c), (b, c, n), (b,)), ("bnc,bcm,b->nm", X, X, X)),
    lambda b, n, c: Case(torch.bmm, ((b, n, c), (b, c, n))),
    lambda b, n, c: Case(F.layer_norm, ((b, n, c + 1), (c + 1,), (c + 1,)), (X, (c + 1,), X, X)),
    lambda b, n, c: Case(F.rms_norm, ((b, n, c), (n, c)), (X, (n, c), X)),
    lambda b, n, c: Case(F.group_norm, ((b, 2 * n, c + 1), (2 * n,), (2 * n,)), (X, n, X, X)),
    lambda b, n, c: Case(
        F.instance_norm, ((b, n, c + 2),)
    ),  # of two values only the smoothing constant has a derivative
    lambda b, n, c: Case(F.batch_norm, ((b + 1, n, c), (n,), (n,)), (X, None, None, X, X, True)),
    lambda b, n, c: Case(
        F.scaled_dot_product_attention, ((b, 2, n, c), (b, 2, c, c), (b, 2, c, n), (n, c)), forward=False
    ),
    lambda b, n, c: Case(torch.gather, ((b, n, c),), (1, torch.arange(2 * c).view(1, 2, c).expand(b, 2, c) % n)),
    lambda b, n, c: Case(operator.getitem, ((b, n, c),), ((slice(None), torch.arange(n) % 2 == 0),)),
    lambda b, n, c: Case(torch.var_mean, ((b, n + 1, c + 1),), ((1, 2),)),
    lambda b, n, c: Case(torch.prod, ((b, n, c),), (1,)),
    lambda b, n, c: Case(F.interpolate, ((b, n, c, c),), ((n + 1, c + 2),), {"mode": "bicubic"}),
    lambda b, n, c: Case(F.grid_sample, ((b, n, c + 1, n + 1), (b, c, n, 2)), kwargs=ALIGNED, forward=False),
    lambda b, n, c: Case(torch.cdist, ((b, n, c), (b, c, c)), forward=False),
]


@pytest.mark.parametrize("make", DRAWN, ids=lambda make: name(make(1, 1, 1)))
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    mask=st.tuples(*[st.booleans()] * 4),
)
def test_rules_hold_for_drawn_shapes_and_zero_masks(make, seed, sizes, mask):
    case = make(*sizes)
    varying = tuple(i for i, on in zip(range(len(case.shapes)), mask, strict=False) if on)
    check_rule(replace(case, varying=varying or (0,)), seed)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    channels=st.integers(1, 3),
    size=st.integers(4, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
)
def test_convolution_and_pooling_rules_hold_for_drawn_settings(seed, channels, size, kernel, stride, dilation):
    assume(dilation * (kernel - 1) + 1 <= size)
    window = {"stride": stride, "padding": kernel // 2, "dilation": dilation}
    image = (2, channels, size, size)
    weight = (2 * channels, 1, kernel, kernel)
    check_rule(Case(torch.conv2d, (image, weight), kwargs={**window, "groups": channels}, varying=(0,)), seed)
    check_rule(Case(F.max_pool2d, (image,), args=(kernel,), kwargs=window), seed)
    del window["dilation"]
    check_rule(Case(F.avg_pool2d, (image,), args=(kernel,), kwargs=window), seed)


class Everything(nn.Module):
    """One operation of each new group after another, positions and keywords that vary included."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 12), nn.Linear(4, 2)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.PReLU(4)])
        self.bias = nn.Parameter(torch.randn(9, 9))

    def forward(self, x):
        y = self.norms[2](self.norms[0](self.conv(x)))
        shift = 0.3 * torch.tanh(y[:, :2]).permute(0, 2, 3, 1)
        y = F.interpolate(F.grid_sample(y, shift, align_corners=False), size=(3, 3), mode="bicubic")
        tokens = self.norms[1](y.flatten(2).transpose(1, 2))
        q, k, v = self.fc(tokens).chunk(3, -1)
        mask = torch.einsum("bqc,bkc->bqk", tokens, tokens) + self.bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = torch.where(y > 0, y, torch.logsumexp(y, 1, keepdim=True)).masked_fill(y < -2, -2.0)
        picked = torch.gather(scores, 1, scores.topk(3, dim=1).indices)
        spread, mean = torch.var_mean(picked, 1)
        return self.out(F.normalize(torch.maximum(spread, mean), dim=-1))


def test_a_network_of_these_operations_has_the_tangent_of_the_original():
    report = fxstn.verify(Everything(), torch.randn(3, 3, 5, 5), hparams=[hp.Dropout("conv")])
    assert report.ok, str(report)
