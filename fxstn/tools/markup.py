"""Pieces of HTML for reports: numbers, tables that can be sorted and filtered, pairs of a name and a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

LONG = 15  # rows, from where on a table has a box to filter them


class Markup(str):
    """Text that is HTML already. All other text is escaped.

    key: a number that a table sorts it by.
    look: the class of the cell.
    """

    key: float | None = None
    look: str = ""

    @classmethod
    def of(cls, text: str, key: float, look: str = "") -> Markup:
        result = cls(text)
        result.key, result.look = key, look
        return result


def number(value: float) -> str:
    return f"{value:.4g}"


def seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td class='number'>{'' if math.isnan(value) else number(value)}</td>"
    if isinstance(value, int):
        return f"<td class='number' data-key='{value}'>{value:,}</td>"
    if isinstance(value, Markup):
        key = "" if value.key is None else f" data-key='{value.key:.9g}'"
        return f"<td class='{value.look}'{key}>{value}</td>"
    return f"<td>{escape(str(value))}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Markup) and value.look == "number")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[object]], label: str = "", kinds: Sequence[str] = (), look: str = ""
) -> str:
    """A table that is sorted by a click on a head. A long one can be filtered.

    rows: cells; numbers stand at the right.
    label: what the rows are, for the box that filters them.
    kinds: of each row, for buttons that show one kind.
    look: the class of the table.
    """
    head = "".join(
        f"<th scope='col' class='{'number' * (bool(rows) and _is_number(rows[0][place]))}'>"
        f"<button type='button'>{escape(name)}</button></th>"
        if name
        else "<td></td>"
        for place, name in enumerate(heads)
    )
    lines = []
    for place, row in enumerate(rows):
        kind = f" data-kind='{escape(kinds[place])}'" if kinds else ""
        lines.append(f"<tr{kind}>{''.join(map(_cell, row))}</tr>")
    body = "\n".join(lines)
    content = f"<table class='{look}'><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    filters = _filters(label, len(rows), kinds) if len(rows) > LONG else ""
    hint = "<p class='hint'>The table goes on at the right: it scrolls.</p>"
    return f"<div class='data'>{filters}{hint}<div class='scroll' tabindex='0'>{content}</div></div>"


def _filters(label: str, count: int, kinds: Sequence[str]) -> str:
    box = (f"<label>Filter {escape(label)} <input type='search' placeholder='part of a name'></label> "
           f"<output>{count} of {count}</output>")  # fmt: skip
    names = dict.fromkeys(kinds) if len(set(kinds)) > 1 else {}
    buttons = "".join(
        f"<button type='button' aria-pressed='false' data-kind='{escape(kind)}'>{escape(kind)} {kinds.count(kind)}</button>"
        for kind in names
    )
    return f"<div class='filters'>{box}{buttons}</div>"


def pairs(items: Iterable[tuple[str, str]]) -> str:
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in items)
    return f"<dl>{''.join(cells)}</dl>"


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    cells = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in items)
    return f"<div class='cards'>{''.join(cells)}</div>"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
