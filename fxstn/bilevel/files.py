"""Files that a run writes whole or not at all; texts in UTF-8."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxstn.ir.input_errors import as_path


def absolute(path: str | Path | None, name: str) -> Path | None:
    """A folder that stays the same one where the program changes its current folder; None for None.

    name: of the argument, for errors.

    Raises as `as_path`.
    """
    return None if path is None else as_path(path, name).absolute()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """The name of a file to write, which is renamed to `path` at the end, so that a reader never sees half of it.

    The folder is made. At an OSError nothing stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, atomically, in UTF-8, whatever the locale. Makes the folder."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: object, indent: int | None = None) -> str:
    """A value as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)
