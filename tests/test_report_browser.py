"""The report in a browser: no errors, tables sort, values under the pointer, 200 hyperparameters, narrow and dark screens."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path")]

# Texts, and what is behind each: elements whose contrast is below WCAG's 4.5, or 3 where they are large.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = Array.from(element.childNodes).some(n => n.nodeType === 3 && n.textContent.trim());
    if (!words || !element.getClientRects().length || element.tagName === "SCRIPT") continue;
    const style = getComputedStyle(element), inside = element instanceof SVGElement;
    const color = parse(inside ? style.fill : style.color);
    let back = element;
    while (back && parse(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
    const [a, b] = [light(color), light(parse(getComputedStyle(back || document.body).backgroundColor))].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) poor.push(element.tagName + ": " + element.textContent.slice(0, 40));
  }
  return poor;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report of 200 hyperparameters."""
    torch.manual_seed(0)
    layers = [layer for _ in range(100) for layer in (nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.1))]
    stn = fxstn.transform(nn.Sequential(*layers, nn.Linear(6, 3)), [hp.Dropout(), hp.WeightDecay("*")])
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.arange(40) % 3), 8)
    runner = fxstn.BilevelRunner(stn, nn.functional.cross_entropy, loader, loader, progress=False,
                                 metrics={"accuracy": fxstn.accuracy})  # fmt: skip
    runner.fit(4)
    runner._tuner.monitors.warnings.append((1, "epoch 1: a sign of trouble; a remedy"))
    path = tmp_path_factory.mktemp("report") / "report.html"
    fxstn.write_report(runner, path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[("light", 1200), ("dark", 1200), ("light", 360)], ids=str)
def page(request, browser, report):
    scheme, width = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda message: None if message.url == report else said.append(message.url))
    page.goto(report)
    yield page
    page.close()
    assert said == []


def test_a_page_is_as_wide_as_its_screen_and_can_be_read(page):
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == []
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    assert page.locator("main").count() == page.locator("h1").count() == 1


def test_a_table_sorts_by_numbers_and_names_and_is_filtered(page):
    table = page.locator(".data").first

    def column(number):
        cells = table.locator(f"tbody tr:visible td:nth-child({number})").all_inner_texts()
        return [float(text.split()[0]) if number > 1 else text for text in cells]

    head = table.locator("th button").nth(3)
    head.click()
    assert column(4) == sorted(column(4))
    head.click()
    assert column(4) == sorted(column(4), reverse=True)
    assert table.locator("th").nth(3).get_attribute("aria-sort") == "descending"
    table.locator("th button").first.click()
    assert column(1)[:2] == ["0.weight_decay", "2.dropout"]
    table.locator("input").fill("29")
    assert len(column(1)) == sum("29" in str(i) for i in range(301) if i % 3 != 1) == 9
    table.locator(".filters button").first.click()
    assert all(name.endswith("dropout") for name in column(1))
    assert page.locator("g.many.faded").count() == 201 - len(column(1))
    assert table.locator("output").inner_text() == f"{len(column(1))} of 201"


def test_the_pointer_and_the_keys_show_values(page):
    few = page.locator(".chart").first
    box = few.locator("svg").bounding_box()
    few.locator("svg").hover(position={"x": box["width"] * 0.97, "y": 20})
    assert few.locator(".tip").inner_text().splitlines()[0] == "epoch 4"
    assert few.locator(".tip div").count() == few.locator(".legend span").count()
    many = page.locator(".chart", has_text="lines: point at one").first
    many.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    assert many.locator(".tip").inner_text().startswith("epoch 3")
    assert many.locator("g.near").count() == 1
