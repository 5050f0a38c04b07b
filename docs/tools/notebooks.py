"""A hook of mkdocs: the notebooks of the repository as pages, with what running them gave; the notebook itself beside each."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[2] / "notebooks"


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def outputs(cell: dict[str, Any], prefix: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Markdown of what a cell gave. A picture becomes a file; the text for it is the metadata "alt" of the cell."""
    printed = ""
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if output["output_type"] == "stream":
            printed += joined(output["text"])
        elif "image/png" in data:
            name = f"{prefix}-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(joined(data["image/png"]))
            yield f"![{cell['metadata']['alt']}]({name})"
        elif "text/plain" in data and not any("widget" in kind for kind in data):
            printed += joined(data["text/plain"]) + "\n"
    if printed.strip():
        yield fenced(printed, "text")


def page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """(Markdown, {file: picture}) of a notebook."""
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
        else:
            parts += [fenced(source, "python"), *outputs(cell, name, pictures)]
    parts.insert(1, f"This page is a notebook that was run: [download it]({name}.ipynb).")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page links to the notebook in the repository; the site has it as a page."""
    return re.sub(r"\]\(\.\./\.\./notebooks/(\w+)\.ipynb\)", r"](../notebooks/\1.md)", markdown)


def on_files(files: Files, config: Any) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        markdown, pictures = page(json.loads(text), path.stem)
        for name, content in {f"{path.stem}.md": markdown, path.name: text, **pictures}.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
