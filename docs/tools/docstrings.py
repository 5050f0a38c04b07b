"""An extension of griffe: docstrings of this library as Markdown.

Here an argument is a line `name: what it is`, with further lines indented. It becomes an entry of a list. `*` and `_` of plain
text stay what they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^([A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*|\w+\([^)]*\)(?: → \w+)?): (.*)")
CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"([*_\[\]<>])")


def escaped(line: str) -> str:
    """Markdown's characters as themselves, outside of code."""
    parts = CODE.split(line)
    return "".join(part if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts)


def as_markdown(text: str) -> str:
    lines: list[str] = []
    in_entry = in_code = False
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if not line.strip():
            in_entry = False
            lines.append("")
        elif line.startswith(">>>") or (in_code and line.strip()):
            in_code = True
            lines.append(f"    {line}")
        elif line.startswith("    ") and not in_entry:
            lines.append(line)  # a formula, or code
        elif entry:
            if not in_entry:
                lines.append("")
            in_entry = True
            lines.append(f"- `{entry[1]}`: {escaped(entry[2])}")
        elif line.startswith("    "):
            lines.append(f"    {escaped(line.strip())}")
        else:
            if in_entry:
                lines.append("")
            in_entry = False
            lines.append(escaped(line))
        if not line.strip():
            in_code = False
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
