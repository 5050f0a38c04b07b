"""A hook of mkdocs: pages whose text stands at the root of the repository, where visitors of the repository look for it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILES = {"index.md": "README.md", "about/changelog.md": "CHANGELOG.md", "about/contributing.md": "CONTRIBUTING.md"}
ROOMS = {"Guides": "guides", "Results": "results"}
PAGES = {file: page for page, file in FILES.items()}


def listed(nav: Any) -> set[str]:
    """The files that a nav names."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(listed, nav.values() if isinstance(nav, dict) else nav))


def on_config(config: Any, **_: Any) -> None:
    """A page that a benchmark or a hand adds to a room stands at the end of it, until mkdocs.yml says where."""
    known = listed(config.nav)
    for section in config.nav:
        for title, pages in section.items():
            if (folder := ROOMS.get(title)) is not None:
                files = (f"{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).glob("*.md")))
                pages += [file for file in files if file not in known]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of the root's file in place of the page's own, with links that hold where the page is; generated parts."""
    source = page.file.src_uri
    for marker, part in {"<!-- commands -->": commands, "<!-- names -->": names}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, part())
    if source not in FILES:
        return markdown
    text = (ROOT / FILES[source]).read_text(encoding="utf-8")
    up = "../" * source.count("/")
    text = re.sub(r"\[(\w+\.cff)\]\(\1\)", r"`\1`", text)  # a file that no page shows
    text = re.sub(r"\]\(docs/", f"]({up}", text)
    return re.sub(r"\]\((\w+\.md)\b", lambda match: f"]({up}{PAGES.get(match[1], match[1])}", text)


def commands() -> str:
    """What `--help` of each command says. The command line needs no torch to say it."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "100"
    from fxstn.tools.cli import parser

    (choices,) = (action.choices for action in parser()._subparsers._group_actions)  # type: ignore[union-attr]
    return "\n\n".join(
        f"## fxstn {name}\n\n```\n{command.format_help().strip()}\n```" for name, command in choices.items()
    )


def names() -> str:
    """The pages of the reference, each with the names on it."""
    parts = []
    for path in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if shown := re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
            title = text.splitlines()[0].removeprefix("# ")
            links = ", ".join(f"[`{name.removeprefix('fxstn.')}`][{name}]" for name in shown)
            parts.append(f"## [{title}]({path.name})\n\n{links}")
    return "\n\n".join(parts)
