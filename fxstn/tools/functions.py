"""Functions of the user's, named on the command line: package.module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def is_function_name(name: str) -> bool:
    """Whether a word has the form package.module:function."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_function(name: str) -> Callable[..., object]:
    """What 'package.module:function' names. The module lies in the current folder or where Python finds modules.

    Raises AttributeError and ImportError.
    """
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; a script that pip installs has its own folder there
    return getattr(importlib.import_module(module), attribute)
