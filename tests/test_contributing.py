"""CONTRIBUTING.md: every block of Python runs, and what it adds works as the page says."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from test_rules import check_rule
from torch import fx, nn
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.decompositions.torchvision import AUGMENTING, RANDOM
from fxstn.frontends.symbolic import trace
from fxstn.ir.tangents import ZERO
from fxstn.passes.canonicalize import canonicalize
from fxstn.rules import RULES, apply_rule

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    title: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """A namespace to run blocks in. What they register is gone afterwards."""
    tables: list[Any] = [RULES, DECOMPOSITIONS, RANDOM, AUGMENTING, hp.OPERATIONS]
    before = [table.copy() for table in tables]
    yield {"__name__": "contributed", "torch": torch}
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def images() -> torch.Tensor:
    return torch.rand(4, 3, 9, 11)


def classifier(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(252, 5))


def test_every_block_belongs_to_a_recipe_that_is_checked_here():
    checked = {f"Add a {thing}" for thing in ("tangent rule", "decomposition", "pass", "conditioned operation")}
    assert {title for title, blocks in BLOCKS.items() if blocks} == checked
    assert PAGE.count("```python") == sum(map(len, BLOCKS.values()))


def test_a_rule_is_a_line_and_so_is_its_test(names):
    rules, lines = BLOCKS["Add a tangent rule"]
    before = set(RULES)
    exec(rules, names)
    added = [eval(ast.unparse(line), vars(cases) | names) for line in ast.parse(lines).body]
    assert {case.function for case in added} == set(RULES) - before
    for case in added:
        if case.function is torch.histc:
            assert apply_rule(torch.histc, (torch.ones(3),), (torch.rand(3),), {})[1] is ZERO
        else:
            check_rule(case)


def test_a_decomposition_makes_a_module_followable(names):
    (block,) = BLOCKS["Add a decomposition"]
    exec(block, names)
    net, x = nn.Sequential(names["Normalized"](4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    stn = fxstn.transform(net, SCALAR)
    torch.testing.assert_close(stn(x), net(x))
    assert "0.weight.U" in dict(stn.response.named_parameters())
    assert fxstn.verify(net, x, hparams=SCALAR).ok
    del DECOMPOSITIONS[names["Normalized"]]
    with pytest.raises(fxstn.TransformError):
        fxstn.transform(net, SCALAR)


def test_a_pass_edits_a_copy(names):
    (block,) = BLOCKS["Add a pass"]
    exec(block, names)

    class Net(nn.Module):
        def forward(self, x):
            return torch.exp(x) - 1 + (torch.exp(x) - 2)

    graph, x = canonicalize(trace(Net(), True)), torch.full((3,), 1e-9, dtype=torch.float64)
    before = str(graph.graph)
    result = names["exact_near_zero"](graph)
    assert str(graph.graph) == before
    assert [node.target for node in result.graph.nodes if node.op == "call_function"] == [
        torch.expm1, torch.exp, operator.sub, operator.add
    ]  # fmt: skip
    torch.testing.assert_close(fx.GraphModule(result, result.graph)(x), Net()(x))


def test_a_conditioned_operation_is_a_class_and_a_line(names):
    (block,) = BLOCKS["Add a conditioned operation"]
    exec(block, names)
    model = classifier(nn.Conv2d(3, 3, 1), v2.RandomSolarize(0.5, p=0.3))
    assert fxstn.verify(model, images()).ok
    stn = fxstn.transform(model)
    assert stn.hparams.values() == {"1.solarize": pytest.approx(0.3)}
    assert "solarize" in str(fxstn.explain(model))
    inserted = fxstn.transform(classifier(), [names["Solarize"]("input")])
    assert inserted.hparams.names == ("input.solarize",)
    with pytest.raises(ValueError, match="RandomSolarize is followed already"):
        fxstn.register_operation(names["Solarize"], v2.RandomSolarize)
    x = torch.tensor([[0.2, 0.7]]).view(1, 1, 1, 2)
    assert names["Solarize"].function(x, 1.0).flatten().tolist() == pytest.approx([0.2, 0.3])
