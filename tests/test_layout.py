"""Where `layouts` says the examples are, they are: each operation of the table by itself."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ZERO_CASES, Case, X
from test_rules import Prepared, name
from torch import fx
from torch.utils._pytree import tree_leaves

from fxstn.layers.noise import alpha_dropout_coefficients, dropout_mask
from fxstn.layout import LOST, layouts

Tensor = torch.Tensor

DRAWS = {torch.empty_like, torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, torch.multinomial}
DRAWS |= {F.rrelu, F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d}
DRAWS |= {dropout_mask, alpha_dropout_coefficients}
# These give any shape; where it does not keep the batch, the response's own check of sizes refuses at run time.
RESHAPES = {Tensor.view, Tensor.view_as, Tensor.reshape_as, torch.reshape, torch.ravel}
RESHAPES |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor}
LEFT_OUT = {*DRAWS, *RESHAPES, Tensor.cuda, F.bilinear}  # its weight has the highest rank
FOLLOWED = [case for case in (*CASES, *ZERO_CASES) if case.function not in LEFT_OUT]


def axis_of_examples(case: Case, prepared: Prepared, examples: list[bool]):
    """The layout of the operation's result in a graph where the marked tensors are inputs and all others constants."""
    graph = fx.Graph()

    def lifted(value, is_input=False):
        if not isinstance(value, Tensor):
            return value
        return graph.placeholder("x") if is_input else graph.get_attr("constant")

    tensors = [lifted(x, is_input) for x, is_input in zip(prepared.tensors, examples, strict=True)]
    args, kwargs = case.placed(tensors, rest=lifted)
    node = graph.call_function(case.function, args, kwargs)
    return layouts(graph)[node]


@pytest.mark.parametrize("case", FOLLOWED, ids=name)
def test_results_follow_a_permutation_of_the_examples_or_each_depends_on_its_own_example_only(case):
    prepared = Prepared(case)
    rank = max(x.dim() for x in prepared.tensors)
    batch = next((x.shape[0] for x in prepared.tensors if x.dim() == rank), 0) if rank else 0
    examples = [0 < rank == x.dim() and x.shape[0] == batch for x in prepared.tensors]
    axis = axis_of_examples(case, prepared, examples) if batch else LOST
    if not isinstance(axis, int):
        return

    def result(change):
        tensors = [change(x) if is_example else x for x, is_example in zip(prepared.tensors, examples, strict=True)]
        args, kwargs = case.placed(tensors)
        leaves = tree_leaves(case.function(*args, **kwargs))
        return [leaf.cdouble() for leaf in leaves if isinstance(leaf, Tensor)]

    before = result(lambda x: x)
    assert all(leaf.shape[axis] == batch for leaf in before)
    order = torch.arange(batch).roll(1)
    permuted = result(lambda x: x[order])
    first_changed = result(lambda x: torch.cat([x[-1:], x[1:]]))
    follows = all(torch.allclose(a.index_select(axis, order), b) for a, b in zip(before, permuted, strict=True))
    others = torch.arange(1, batch)
    own = all(
        torch.allclose(a.index_select(axis, others), b.index_select(axis, others))
        for a, b in zip(before, first_changed, strict=True)
    )
    assert follows or own


@pytest.mark.parametrize(
    ("function", "args", "axis"),
    [
        (torch.einsum, ("bqc,bkc->qbk", X, X), 1),
        (torch.einsum, ("bqc,bqc->qc", X, X), LOST),
        (F.bilinear, (X, X, None), 0),
        (torch.mean, (X, 1), 0),
        (torch.mean, (X, 0), LOST),
        (operator.getitem, (X, (slice(None), None, 0)), 0),
        (operator.getitem, (X, (None, slice(None))), 1),
        (operator.getitem, (X, (slice(0, 2),)), LOST),
        (torch.topk, (X, 2, 0), LOST),
        (torch.topk, (X, 2), 0),
        (torch.movedim, (X, 0, 1), LOST),
    ],
)
def test_the_axis_of_the_examples_is_followed_or_lost(function, args, axis):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(function, tuple(x if arg is X else arg for arg in args))
    assert layouts(graph)[node] == axis


def test_an_axis_in_front_of_the_examples_that_is_dropped_moves_them():
    graph = fx.Graph()
    folded = graph.call_function(torch.permute, (graph.placeholder("x"), (1, 0, 2)))
    kept = graph.call_function(torch.sum, (folded, 0), {"keepdim": True})
    dropped = [graph.call_function(f, (folded, 0)) for f in (torch.sum, torch.select, operator.getitem)]
    stacked = graph.call_function(torch.stack, ([folded, folded],), {"dim": 0})
    assert layouts(graph)[kept] == 1
    assert [layouts(graph)[node] for node in dropped] == [0, 0, 0]
    assert layouts(graph)[stacked] == 2
