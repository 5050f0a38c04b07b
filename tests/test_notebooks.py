"""Notebooks: they hold what running them gave, pictures included, and run from an empty folder (nightly)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NEEDS = {"transformer": "transformers"}  # beside fxstn[notebooks]


def test_there_are_notebooks_for_images_for_a_transformer_and_for_reading_a_run():
    assert [path.stem for path in FILES] == ["images", "read_a_run", "transformer"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom_and_shows_pictures(path):
    content = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    assert "![](" not in content  # a picture has a text for those who do not see it
    assert all(cell["metadata"].get("alt") for cell in cells if '"image/png"' in json.dumps(cell["outputs"]))
    assert len(content) < 500_000


@pytest.mark.nightly
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra fxstn[notebooks]")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra fxstn[notebooks]")
    pytest.importorskip("ipykernel", reason="needs the extra fxstn[notebooks]")
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem], reason=f"needs the extra fxstn[{NEEDS[path.stem]}]")
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises CellExecutionError
    assert (tmp_path / "report.html").is_file()
