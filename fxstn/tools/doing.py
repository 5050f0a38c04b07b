"""What a tool is doing while it runs, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def doing(what: str) -> Iterator[tqdm]:
    """A line with the time since its start, on stderr and on a terminal only. `set_description_str` says what comes next."""
    with tqdm(desc=what, bar_format="{desc} [{elapsed}]", leave=False, disable=None) as line:
        yield line
