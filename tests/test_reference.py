"""The API reference: every public name has its place, once; every public docstring says what its readers need."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import fxstn
from fxstn import hp
from tests.docstrings import entries, lacks, methods, report

ROOT = Path(__file__).parents[1]
SHOWN = Counter(
    name
    for page in (ROOT / "docs" / "reference").glob("*.md")
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)


def adapters() -> set[str]:
    """Public classes and functions that the files of fxstn/integrations define and fxstn itself does not export."""
    result = set()
    for path in (ROOT / "fxstn" / "integrations").glob("[a-z]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                documented = ast.get_docstring(node) or ""
                if node.name not in fxstn.__all__ and re.match(r"`|A callback of", documented):
                    result.add(f"fxstn.integrations.{path.stem}.{node.name}")
    return result


def test_the_reference_has_every_public_name_once():
    public = {f"fxstn.{name}" for name in fxstn.__all__ if name != "hp"}
    public |= {f"fxstn.hp.{name}" for name in hp.__all__}
    assert len(adapters()) >= 3
    assert set(SHOWN) == public | adapters()
    assert max(SHOWN.values()) == 1


def test_public_docstrings_name_arguments_ranges_exceptions_and_sources():
    assert report() == []


def test_what_a_docstring_lacks_is_named():
    def drawn(rate: float, size: int, seed: int) -> None:
        """Draws.

        rate: of dropout.
        size: ≥ 1.
        """
        raise ValueError("never")

    assert list(lacks("fxstn.drawn", drawn)) == [
        "shape, range or unit of rate: 'of dropout.'", "the argument seed", "what raises ValueError"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: one\n    two\nb, c: three\n\nd", {"a": "one two", "b": "three", "c": "three"}), ("no entry", {})],
)
def test_entries_are_read_with_their_further_lines(text, expected):
    assert entries(text) == expected


def test_methods_of_public_classes_are_looked_at_once_those_of_bases_too():
    names = [name for name, _ in methods()]
    assert len(names) == len(set(names)) > 100
    assert {"fxstn.BilevelRunner.fit", "fxstn.Refittable.refit", "fxstn.History.best", "fxstn.Explanation.ok"} <= {
        *names
    }
    assert "fxstn.Flip.apply" not in names  # says what hp.Operation says
