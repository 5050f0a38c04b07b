"""One export serves both modes of a forward that differs between them in its dropouts alone, and no other forward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxstn.frontends.export import Export
from fxstn.frontends.export_modes import modes_agree
from fxstn.frontends.inputs import Inputs, InputSpec
from fxstn.passes.canonicalize import canonicalize, drop_handed_through

X = torch.randn(3, 5, 8)


class Block(nn.Module):
    """Attention and a layer, with dropouts of all spellings; Python branches on a size.

    more: what else it does, (module, value) → output.
    """

    def __init__(self, more=lambda module, h: h):
        super().__init__()
        self.qkv, self.fc, self.norm, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.3)
        self.other, self.more = nn.Parameter(torch.ones(8, 8)), more

    def forward(self, x):
        q, k, v = self.drop(self.qkv(x)).chunk(3, -1)
        if x.shape[1] > 1:
            x = x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        h = F.dropout(self.fc(self.norm(x)), p=0.2, training=self.training)
        return self.more(self, F.dropout1d(h, 0.5, self.training) + x)


def _assign(module, h):
    if not module.training:
        module.seen = 1
    return h


def _without_gradients(module, h):
    with torch.set_grad_enabled(module.training):
        return h * 2


OTHERS = {
    "another value": lambda m, h: h if m.training else h * 2,
    "another weight": lambda m, h: F.linear(h, m.fc.weight if m.training else m.other),
    "another number": lambda m, h: h * (1.0 if m.training else 2.0),
    "another output": lambda m, h: (h, h) if m.training else h,
    "an order of outputs": lambda m, h: (h, h.exp()) if m.training else (h.exp(), h),
    "a size that only one mode looks at": lambda m, h: h if m.training or h.shape[1] < 100 else h * 2,
    "a size that is computed with": lambda m, h: h if m.training or math.sqrt(h.shape[1] * 8) < 100 else h * 2,
    "a dropout that acts in both": lambda m, h: F.dropout(h, 0.5),
    "an attribute": _assign,
    "a value that Python looks at": lambda m, h: h if h.sum() > 0 else -h,
    "gradients": _without_gradients,
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
def test_a_forward_that_does_something_else_in_eval_mode_is_exported_in_both(more):
    assert not modes_agree(Block(more), (), Inputs((X,), {}))


def _shown(module):
    """The operations of a graph; what leaves the values as they are is left out."""
    graph = drop_handed_through(canonicalize(module)).graph
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def shown(structure):
        return str(torch.fx.node.map_arg(structure, lambda node: numbers[node]))

    attention = F.scaled_dot_product_attention  # whose dropout is 0 by default
    args = [
        node.args[:3] if node.target is attention and node.args[4:] == (0.0,) else node.args for node in graph.nodes
    ]
    return [(n.target, shown(own), shown(n.kwargs)) for n, own in zip(graph.nodes, args, strict=True)]


def test_the_graph_of_eval_mode_is_the_one_that_an_export_of_its_own_would_be(monkeypatch):
    model, export = Block(), torch.export.export
    frontend, exports = Export(InputSpec.of(model, Inputs((X,), {}))), []
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))
    graphs = frontend.captures(model)
    assert len(exports) == 1
    monkeypatch.setattr("fxstn.frontends.export.modes_agree", lambda *_: False)
    own = frontend.capture(model, False)
    assert len(exports) == 2
    assert _shown(graphs[1]) == _shown(own) != _shown(graphs[0])
    model.eval()
    run = torch.fx.GraphModule(graphs[1], graphs[1].graph)
    for x in (X, torch.randn(7, 4, 8)):
        assert torch.equal(run(x), model(x))
    monkeypatch.undo()
    assert _shown(frontend.capture(model, False)) == _shown(graphs[1])
