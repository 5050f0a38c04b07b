"""What passes believe about an operation, against what it does: random draws, side effects, shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxstn
from fxstn import hp
from fxstn.frontends.symbolic import Symbolic
from fxstn.ops.noise import track_batch, track_batches
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.effects import is_pure, is_random, shared_arguments
from fxstn.passes.simplify import simplify
from fxstn.rules import RULES
from tests.cases import CASES, FALLBACK_CASES, ZERO_CASES, Case
from tests.nets import randomize_response
from tests.test_rules import Prepared, name

ALL_CASES = [case for case in (*CASES, *ZERO_CASES, *FALLBACK_CASES) if case.function is not torch.Tensor.cuda]
CALLS: list[str] = []


@torch.fx.wrap
def jitter(x):
    return x + torch.rand_like(x) if len(x) else x


@torch.fx.wrap
def noted(x):
    CALLS.append("noted")
    return x * 2 if len(x) else x


@torch.fx.wrap
def zeroed(x):
    x.zero_()
    return x.sum() if len(x) else x


@torch.fx.wrap
def cut(x):
    x.clamp_(max=0.1)


@torch.library.custom_op("fxstn_tests::jitter", mutates_args=())
def custom_jitter(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


@pytest.fixture(scope="module", autouse=True)
def _rule_of_jitter():
    fxstn.register_rule(torch.ops.fxstn_tests.jitter, lambda dx, y, x: dx)
    yield
    del RULES[torch.ops.fxstn_tests.jitter]


class Calls(nn.Module):
    """What `body` makes of a layer's output."""

    def __init__(self, body) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, x):
        return self.body(self.layer(x))


DRAWS = {
    "fx.wrap": lambda h: jitter(h) - jitter(h),
    "custom operator": lambda h: torch.ops.fxstn_tests.jitter(h) - torch.ops.fxstn_tests.jitter(h),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h) - F.gumbel_softmax(h),
    "rrelu": lambda h: F.rrelu(-h.abs(), training=True) - F.rrelu(-h.abs(), training=True),
    "bernoulli": lambda h: h * torch.bernoulli(torch.sigmoid(h)) - h * torch.bernoulli(torch.sigmoid(h)),
    "normal": lambda h: torch.normal(h.detach(), 1.0) - torch.normal(h.detach(), 1.0) + 0 * h,
    "rand_like": lambda h: torch.rand_like(h) - torch.rand_like(h) + 0 * h,
    "multinomial": lambda h: h * (torch.multinomial(h.exp(), 4) - torch.multinomial(h.exp(), 4)),
    "fractional_max_pool2d": lambda h: _pooled(h) - _pooled(h),
}


def _pooled(h):
    image = h.reshape(1, -1, 2, 1).expand(1, -1, 2, 9)
    return F.fractional_max_pool2d(image + torch.arange(9.0), (1, 2), output_size=(1, 3)).sum(3).reshape(h.shape[0], -1)


@pytest.mark.parametrize("body", DRAWS.values(), ids=DRAWS)
def test_two_draws_stay_two(body):
    stn = fxstn.transform(Calls(body), [hp.Scalar("unused", 0.5, 0, 1)]).train()
    randomize_response(stn)
    x = torch.randn(9, 4)
    y, dy = stn.pushforward(x, delta=torch.ones(1))
    assert stn(x).any()
    assert y.any()
    assert torch.isfinite(dy).all()


def test_a_draw_that_nobody_reads_may_go():
    graph = fx.symbolic_trace(lambda x: (torch.rand_like(x), x + 1)[1])
    assert not any(node.target is torch.rand_like for node in simplify(graph).graph.nodes)


@pytest.mark.parametrize(
    "body", [lambda h: noted(h) + noted(h), lambda h: (noted(h), noted(h), h)[2]], ids=["read", "not"]
)
def test_a_users_function_runs_as_often_as_in_the_model(body):
    """It may write a log, or count its calls."""
    net = Calls(body)
    stn = fxstn.transform(net, [hp.Scalar("unused", 0.5, 0, 1)]).train()
    CALLS.clear()
    torch.testing.assert_close(stn(torch.ones(3, 4)), net(torch.ones(3, 4)))
    assert len(CALLS) == 4


def written_then_compared(h):
    first, second = h.exp(), h.exp()
    return zeroed(first.view(-1)) + first - second


class Cut(nn.Module):
    """A user's function whose result nobody reads writes into the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.head = nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x):
        x = x.clone()
        cut(x)
        return self.head(self.drop(self.layer(x).tanh()))


def test_what_has_an_effect_that_nobody_reads_stays_in_the_graph_of_every_step():
    stn = fxstn.transform(Cut().double(), [hp.Dropout()]).eval()
    x, delta = torch.randn(6, 4).double(), torch.zeros(1).double()
    outputs = [stn.perturbed_output(x, delta=delta)[0], stn.output_at_rest(x), stn.pushforward(x, delta=delta)[0]]
    for output in outputs:
        torch.testing.assert_close(output, stn.model(x))


def test_values_that_a_users_function_may_write_into_are_not_merged():
    net, x = Calls(written_then_compared), torch.randn(3, 4)
    assert torch.equal(simplify(canonicalize(Symbolic(None).capture(net, True, (), None)))(x), net(x))
    assert net(x).any()


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        y = F.instance_norm(x, self.mean, self.var, use_input_stats=True)
        return self.layer(y + F.instance_norm(x, self.mean, self.var, use_input_stats=True))


def test_two_updates_of_one_statistic_stay_two():
    net, x = TwoNorms(), torch.randn(5, 4, 6)
    stn = fxstn.transform(net, [hp.Scalar("unused", 0.5, 0, 1)]).train()
    stn(x), net.train()(x)
    assert torch.equal(stn.model.mean, net.mean)


def called(case: Case) -> tuple[fx.Node, list[torch.Tensor], object, object]:
    """(a node that calls the case's function, its tensors, the results of two calls)."""
    prepared = Prepared(case)
    args, kwargs = case.placed(prepared.tensors)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(prepared.tensors))]
    node = graph.call_function(case.function, *case.placed(nodes))
    return node, prepared.tensors, case.function(*args, **kwargs), case.function(*args, **kwargs)


def dense_leaves(result: object) -> list[torch.Tensor]:
    """The tensors with entries in a result; the values of those that are sparse."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in (x._values() if x.is_sparse else x for x in leaves) if leaf.numel()]


@pytest.mark.parametrize("case", ALL_CASES, ids=name)
def test_results_that_share_memory_and_random_results_are_known(case):
    node, tensors, first, second = called(case)
    results = dense_leaves(first)
    memory = {leaf.untyped_storage().data_ptr() for leaf in results}
    shared = {source for source, tensor in zip(node.graph.nodes, tensors, strict=False)
              if tensor.untyped_storage().data_ptr() in memory}  # fmt: skip
    assert shared <= set(shared_arguments(node))
    others = dense_leaves(second)
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, others, strict=True))
    uninitialised = "empty" in name(case)
    assert same or uninitialised or is_random(case.function)
    assert not (is_random(case.function) and is_pure(node))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.repeat_interleave(x, 2, dim=0),
        lambda x: torch.take_along_dim(x, x.argsort(dim=1), dim=1),
        lambda x: torch.diag(x),
        lambda x: F.one_hot(x.argmax(1), 4).float(),
    ],
    ids=["repeat_interleave", "take_along_dim", "diag", "one_hot"],
)
def test_a_change_in_place_of_a_fresh_result_is_followed(function):
    """torch composes these of others, so that no schema says that their result is in memory of its own."""

    def body(h):
        result = function(h)
        result.add_(1.0)
        return result.sum() + h.sum(1)

    model, x = Calls(body), torch.randn(4, 4)
    graph = fxstn.transform(model, [hp.Dropout("input")], trace="fx").graph("eval")
    assert torch.equal(graph(x), model(x))


class CountingTwice(nn.Module):
    """Three batch norms, of which one is called twice and one averages cumulatively."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.cumulative = (nn.BatchNorm1d(4, momentum=m) for m in (0.1, 0.2, None))

    def forward(self, x):
        return self.cumulative(self.twice(self.first(self.twice(x))))


def test_batch_norms_count_a_batch_by_one_operation_as_the_original_does():
    model = CountingTwice()
    stn = fxstn.transform(model, [hp.Scalar("a", 0.5, 0.0, 1.0)]).train()
    targets = [node.target for node in stn.graph("train").graph.nodes]
    assert (targets.count(track_batches), targets.count(track_batch)) == (1, 2)  # the second call, the average
    for _ in range(3):
        x = torch.randn(8, 4)
        model(x), stn(x)
    for path, statistic in model.named_buffers():
        torch.testing.assert_close(stn.model.get_buffer(path), statistic)
