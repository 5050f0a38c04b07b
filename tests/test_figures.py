"""Figures of README and docs come from the files under benchmarks/results: what a page says is what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.matrix import shown_error

ROOT = Path(__file__).parents[1]
WRITTEN = ("support", "families", "transformers")  # whole pages, by benchmarks of these names
PAGES = {str(page.relative_to(ROOT)): page for page in tables.PAGES if page.stem not in WRITTEN}
RESULTS = re.compile(r"README\.md|docs/results/.*")
SETTING = r"(?:Python|[Tt]orch|PyTorch|torchvision|lightning|transformers|timm) \d+(?:\.\d+)*(?: (?:to|or|and) \d+(?:\.\d+)*)*"
LEFT_OUT = (  # of a page: parts from results, hidden blocks, code, addresses, versions
    re.compile(r"<!-- (?:table|text) [\w-]+ -->.*?<!-- end -->", re.DOTALL), re.compile(r"<!---.*?--->", re.DOTALL),
    re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE), re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)"),
    re.compile(r"arXiv \d+\.\d+"), re.compile(SETTING),
)  # fmt: skip
MEASURED = re.compile(r"\d\.\d|\d ?%|\d of \d")


def typed(text: str, everywhere: bool) -> list[str]:
    """Lines with a figure that no file stands behind: a decimal or a share, in prose; everywhere: in tables as well."""
    for pattern in LEFT_OUT:
        text = pattern.sub("", text)
    return [line for line in text.splitlines() if MEASURED.search(line) and (everywhere or not line.startswith("|"))]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_results_say(page):
    """`make figures` mends a difference."""
    text = PAGES[page].read_text(encoding="utf-8")
    assert tables.rendered(text) == text


@pytest.mark.parametrize("name", WRITTEN)
def test_a_matrix_has_the_error_of_each_row_of_its_results(name):
    rows = json.loads((tables.RESULTS / f"{name}.json").read_text())
    text = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    shown = {cells[0].partition(" (blocks")[0]: cells[-1] for cells in lines[2:]}
    assert shown.keys() == rows.keys()
    assert shown == {key: shown_error(row) or shown[key] for key, row in rows.items()}  # without an error: why
    assert f"{sum(bool(row.get('ok')) for row in rows.values())} " in text.split("|")[0]


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_of_a_page_is_typed(page):
    """A setting stands in code: `0.5`."""
    assert typed(PAGES[page].read_text(encoding="utf-8"), bool(RESULTS.fullmatch(page))) == []


def test_a_wrong_figure_and_a_typed_one_are_seen():
    right = tables.rendered("<!-- text tuned-run -->\n<!-- end -->\n")
    wrong = re.sub(r"\d\.\d", "9.9", right)
    assert wrong != right == tables.rendered(wrong)
    assert typed(f"{right}It took 1.3 times as long at `0.5`, with Python 3.11.\n| a | 0.2 |\n", True) == [
        "It took 1.3 times as long at , with .", "| a | 0.2 |"
    ]  # fmt: skip
