"""Pages: every block of Python of CONTRIBUTING.md runs; what README and docs name exists."""

from __future__ import annotations

import ast
import importlib
import operator
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torchvision.transforms import v2

import fxstn
from fxstn import hp
from fxstn.frontends.decompositions import DECOMPOSITIONS
from fxstn.frontends.symbolic import Symbolic
from fxstn.ir.tangents import ZERO
from fxstn.ops.response import responses_in
from fxstn.passes.canonicalize import canonicalize
from fxstn.passes.condition import condition
from fxstn.passes.simplify import simplify
from fxstn.rules import RULES, apply_rule
from tests import cases
from tests.registered import tables_restored
from tests.test_rules import check_rule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    title: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
SCALAR = [hp.Scalar("a", 0.5, 0, 1)]
TRANSFORM: Any = sys.modules[fxstn.transform.__module__]


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """The namespace of an empty file, to run blocks in. What they register is gone afterwards."""
    with tables_restored():
        yield {"__name__": "contributed"}


def run(block: str, names: dict[str, Any]) -> None:
    """As a file of its own, which has no annotations as strings."""
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)


def images() -> torch.Tensor:
    return torch.rand(4, 3, 9, 11)


def classifier(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(252, 5))


def test_every_block_belongs_to_a_recipe_that_is_checked_here():
    checked = {
        f"Add a {thing}" for thing in ("tangent rule", "decomposition", "pass", "frontend", "conditioned operation")
    }
    assert {title for title, blocks in BLOCKS.items() if blocks} == checked
    assert PAGE.count("```python") == sum(map(len, BLOCKS.values()))


def test_a_rule_is_a_line_and_so_is_its_test(names):
    rules, lines = BLOCKS["Add a tangent rule"]
    before = set(RULES)
    run(rules, names)
    added = [eval(ast.unparse(line), vars(cases) | names) for line in ast.parse(lines).body]
    assert {case.function for case in added} == set(RULES) - before
    for case in added:
        if case.function is torch.histc:
            assert apply_rule(torch.histc, (torch.ones(3),), (torch.rand(3),), {})[1] is ZERO
        else:
            check_rule(case)


def test_a_decomposition_makes_a_module_followable(names):
    (block,) = BLOCKS["Add a decomposition"]
    run(block, names)
    net, x = nn.Sequential(names["Normalized"](4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    stn = fxstn.transform(net, SCALAR)
    torch.testing.assert_close(stn(x), net(x))
    assert "0.weight" in responses_in(stn.response)
    assert fxstn.verify(net, x, hparams=SCALAR).ok
    del DECOMPOSITIONS[names["Normalized"]]
    with pytest.raises(fxstn.TransformError, match="symbolic tracing cannot follow the forward"):
        fxstn.transform(net, SCALAR)


def test_a_pass_edits_a_copy_and_is_an_entry_in_the_list(names, monkeypatch):
    (block,) = BLOCKS["Add a pass"]
    run(block, names)

    class Net(nn.Module):
        def forward(self, x):
            return torch.exp(x) - 1 + (torch.exp(x) - 2)

    graph, x = canonicalize(Symbolic().capture(Net(), True)), torch.full((3,), 1e-9, dtype=torch.float64)
    before = str(graph.graph)
    result = names["exact_near_zero"](graph)
    assert str(graph.graph) == before
    assert [node.target for node in result.graph.nodes if node.op == "call_function"] == [
        torch.expm1, torch.exp, operator.sub, operator.add
    ]  # fmt: skip
    torch.testing.assert_close(fx.GraphModule(result, result.graph)(x), Net()(x))
    passes = {"plain": (condition, names["exact_near_zero"], simplify)}
    monkeypatch.setattr(TRANSFORM, "PIPELINES", dict(TRANSFORM.PIPELINES) | passes)
    stn = fxstn.transform(nn.Sequential(nn.Linear(2, 2), Net()), SCALAR)
    targets = {node.target for node in stn.graph("train").graph.nodes}
    assert torch.expm1 in targets
    assert torch.expm1 not in {node.target for node in stn.graph("pushforward").graph.nodes}


def test_a_frontend_is_a_class_and_an_entry(names, monkeypatch):
    (block,) = BLOCKS["Add a frontend"]
    run(block, names)
    monkeypatch.setattr(TRANSFORM, "FRONTENDS", (*TRANSFORM.FRONTENDS, names["Plain"]))
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    stn = fxstn.transform(net, [*SCALAR, hp.WeightDecay()], trace="plain")
    assert stn.frontend == "plain"
    assert stn.hparams.names == ("a", "0.weight_decay", "2.weight_decay")
    torch.testing.assert_close(stn(x), net(x))
    assert fxstn.verify(net, x, hparams=SCALAR, trace="plain").ok


def test_a_conditioned_operation_is_a_class_and_a_line(names):
    (block,) = BLOCKS["Add a conditioned operation"]
    run(block, names)
    model = classifier(nn.Conv2d(3, 3, 1), v2.RandomSolarize(0.5, p=0.3))
    assert fxstn.verify(model, images()).ok
    stn = fxstn.transform(model)
    assert stn.hparams.values() == {"1.solarize": pytest.approx(0.3)}
    assert "solarize" in str(fxstn.explain(model))
    inserted = fxstn.transform(classifier(), [names["Solarize"]("input")])
    assert inserted.hparams.names == ("input.solarize",)
    with pytest.raises(ValueError, match=r"RandomSolarize is taken over by hp\.Solarize already; register a class of"):
        fxstn.register_operation(hp.Cutout, v2.RandomSolarize)
    first = names["Solarize"]
    run(block, names)  # as a cell of a notebook that is run again
    assert first is not names["Solarize"]
    (site,) = (
        fxstn.transform(model).canonical(True).graph.find_nodes(op="call_function", target=names["Solarize"].function)
    )
    assert site.target is not first.function
    x = torch.tensor([[0.2, 0.7]]).view(1, 1, 1, 2)
    assert names["Solarize"].function(x, 1.0).flatten().tolist() == pytest.approx([0.2, 0.3])


def test_an_operation_of_another_library_is_registered_as_the_page_says(names, monkeypatch):
    class GaussianDropout(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, x):
            return x * (1 + self.rate * torch.randn_like(x)) if self.training else x

    page = (ROOT / "docs" / "guides" / "own.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "register_operation" in block)
    assert len([line for line in block.splitlines() if line]) <= 15
    monkeypatch.setitem(sys.modules, "their_library", SimpleNamespace(GaussianDropout=GaussianDropout))
    run(block, names)
    model, x = classifier(nn.Conv2d(3, 3, 1), GaussianDropout(0.3)), images()
    for trace in ("fx", "export", "live"):
        stn = fxstn.transform(model, trace=trace, example_inputs=x)
        assert stn.hparams.values() == {"1.rate": pytest.approx(0.3)}
        assert fxstn.verify(model, x, trace=trace).ok


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:fxstn|tests|benchmarks|examples|docs)/[\w./-]*\w", text)
    linked = [os.path.relpath(path.parent / link, ROOT) for link in re.findall(r"\]\((?!http)([\w./-]+)", text)]
    assert [name for name in (*named, *linked) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pictures_have_words_for_those_who_do_not_see_them(path):
    text = path.read_text(encoding="utf-8")
    assert [alt for alt in re.findall(r"!\[([^\]]*)\]\(", text) if len(alt.split()) < 5] == []


def resolved(dotted: str) -> bool:
    """Whether `fxstn.a.b` is a module or an attribute of one, also of an adapter whose framework is not installed."""
    value: Any = fxstn
    for name in dotted.split(".")[1:]:
        if not hasattr(value, name):
            module, _, last = dotted.rpartition(".")
            if module.startswith("fxstn.integrations."):
                return last in names_in(module)
            return importlib.util.find_spec(dotted) is not None
        value = getattr(value, name)
    return True


def names_in(module: str) -> set[str]:
    """The names of a module: those of its file where the module needs a library that is not installed."""
    try:
        return set(dir(importlib.import_module(module)))
    except ImportError:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        return {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_of_the_library_that_a_page_uses_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"\bfxstn(?:\.[A-Za-z]\w*)+", text))
    named |= {f"fxstn.{name}" for name in re.findall(r"\bhp\.[A-Z]\w*", text)}
    assert sorted(name for name in named if not resolved(name)) == []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxstn"):
                names = names_in(node.module)
                assert [alias.name for alias in node.names if alias.name not in names] == [], block


def test_the_room_of_training_lists_each_of_its_files_once():
    folder = Path(fxstn.__file__).parent / "bilevel"
    listed = re.findall(r"\w+(?=[,.])", fxstn.bilevel.__doc__.partition("\n\n")[2])
    assert sorted(listed) == sorted(path.stem for path in folder.glob("[a-z]*.py"))
