"""Every block of Python on the pages and in docstrings runs. The blocks of a page share one namespace, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

from tests.registered import tables_restored

ROOT = Path(__file__).parents[1]
PAGES = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT), patterns=["*.md"])
DOCSTRINGS = Sybil(
    parsers=[DocTestParser()], path=str(ROOT), patterns=["*.py"], document_types={".py": PythonDocStringDocument}
)
FILES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "docs").rglob("*.md")  # tests/test_package.py runs the README's
    if "```python\n" in path.read_text(encoding="utf-8")
)
MODULES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "fxstn").rglob("*.py")
    if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)


def evaluate(document: Document) -> tuple[int, list[str]]:
    """(number of examples that ran, reasons of those that did not)"""
    ran, reasons = 0, []
    for example in document:
        try:
            example.evaluate()
            ran += 1
        except SkipTest as reason:
            reasons.append(str(reason))
    return ran, reasons


@pytest.mark.parametrize("file", FILES, ids=str)
def test_blocks_of_a_page_run_as_pasted(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tables_restored():
        _, reasons = evaluate(PAGES.parse(ROOT / file))
    assert all(len(reason) > 20 for reason in reasons), reasons


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_examples_of_docstrings_run(file):
    ran, reasons = evaluate(DOCSTRINGS.parse(ROOT / file))
    assert ran
    assert not reasons
