"""Functions of the user's, named on the command line: package.module:function."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from fxstn.ir.input_errors import first_line


def is_function_name(name: str) -> bool:
    """Whether a word has the form package.module:function."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_function(name: str, *keywords: str) -> Callable[..., object]:
    """What 'package.module:function' names. The module lies in the current folder or where Python finds modules.

    keywords: that it is to be called with.

    Raises ValueError where there is no such function, or where it needs other arguments. What its module raises when it is
    imported, and is no ImportError, is left as it is.
    """
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; a script that pip installs has its own folder there
    try:
        place = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{name}: {module} cannot be imported: {error}") from error
        raise ValueError(
            f"{name}: there is no module {error.name!r} in {folder}, nor where Python finds modules"
        ) from error
    except ImportError as error:
        raise ValueError(f"{name}: {module} cannot be imported: {error}") from error
    try:
        function = getattr(place, attribute)
    except AttributeError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error
    if not callable(function) or isinstance(function, nn.Module):
        raise ValueError(f"{name} is a {type(function).__name__}; name a function that returns it")
    if missing := _needed(function, keywords):
        alone = f"with {' and '.join(keywords)} alone" if keywords else "without arguments"
        raise ValueError(f"{name} needs {', '.join(missing)}; name a function that can be called {alone}")
    return function


def parameters_of(function: Callable[..., object]) -> Mapping[str, inspect.Parameter] | None:
    """{name: parameter} of a function; None where Python does not know them, as for some builtins."""
    if getattr(function, "__init__", None) is nn.Module.__init__:  # of a class; it says **kwargs, and takes none
        return {}
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return None


def _needed(function: Callable[..., object], keywords: Sequence[str]) -> list[str]:
    """The parameters that a call with these keywords leaves without a value."""
    return [
        name for name, parameter in (parameters_of(function) or {}).items()
        if parameter.default is parameter.empty and (name not in keywords or parameter.kind is parameter.POSITIONAL_ONLY)
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]  # fmt: skip
