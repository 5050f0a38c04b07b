"""What public docstrings lack: arguments, their shapes or units, what raises, the source of a method.

`python -m tests.docstrings` prints it; tests/test_reference.py checks that there is nothing.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import fxstn
from fxstn import hp

ELSEWHERE = re.compile(r"[Ss]ee `|[Aa]s (?:for|of|that of|those of|in) `|[Rr]aises as|[Rr]aise as|listed at the end")
SHAPED = re.compile(
    r"\([^()]*\)|[\[(][^\])]*,[^\])]*[\])]|≥|>|≤|<|∈|\d|number|loss|scalar|share|examples|steps|epochs|minutes|pixels|"
    r"one |True|False|None|dtype|whether|function|factory|\{"
)
SOURCE = re.compile(r"et al\.|arXiv|[Pp]aper|torch|`F\.|`v2\.|as in|Eq\.|As `|Takes? over|&|fxstn|wide")
QUANTITIES = re.compile(r"\b(?:Tensor|int|float)\b")
PUBLIC = {"fxstn": fxstn, "fxstn.hp": hp}


def public() -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of all names that the package and hp export, functions and classes."""
    for module, room in PUBLIC.items():
        for name in room.__all__:
            value = getattr(room, name)
            if not isinstance(value, (ModuleType, dict, tuple, list, set)):
                yield f"{module}.{name}", value
    for name in fxstn.optim.__all__ if hasattr(fxstn.optim, "__all__") else ():
        yield f"fxstn.optim.{name}", getattr(fxstn.optim, name)


def methods() -> Iterator[tuple[str, Any]]:
    """(qualified name, function) of the public methods and properties of public classes, once each, those of bases too.

    One that has no docstring of its own says what the method of a base says that it overrides.
    """
    seen: set[str] = set()
    for _, cls in public():
        for name in dir(cls) if isinstance(cls, type) else ():
            function = _function(inspect.getattr_static(cls, name))
            if name.startswith("_") or function is None or function.__qualname__ in seen:
                continue
            seen.add(function.__qualname__)
            if function.__doc__ or not any(_has(base, name) for base in cls.__mro__[1:]):
                yield f"{function.__module__.partition('.')[0]}.{function.__qualname__}", function


def _has(base: type, name: str) -> bool:
    return name in vars(base) or name in inspect.get_annotations(base)


def _function(attribute: Any) -> FunctionType | None:
    """Of a method or a property of this library; None: it is something else."""
    function = getattr(attribute, "__func__", getattr(attribute, "fget", attribute))
    ours = isinstance(function, FunctionType) and function.__module__.startswith("fxstn")
    ours = ours and "." in function.__qualname__  # a kernel that a class names is none of its methods
    return function if ours and "<" not in function.__code__.co_filename else None


def arguments(value: Any) -> dict[str, str]:
    """{argument: its annotation}, of a function, or of what makes an object of a class."""
    if isinstance(value, type) and issubclass(value, Exception):
        return {}
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: str(p.annotation) for p in parameters if p.kind not in kinds and p.name not in ("self", "cls")}


def entries(text: str) -> dict[str, str]:
    """{argument: what the docstring says of it}, of lines `name, name: text` and their continuations."""
    result: dict[str, str] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            current = match[1].split(", ")
            result |= dict.fromkeys(current, match[2])
        elif current and line.startswith("    "):
            result |= {name: f"{result[name]} {line.strip()}" for name in current}
        else:
            current = []
    return result


def raised(value: Any) -> set[str]:
    """Names of the exceptions that its own code raises: of a function, or of what makes an object."""
    names: set[str] = set()
    makers = (
        [value] if inspect.isfunction(value) else [vars(value).get(n) for n in ("__init__", "__post_init__", "__new__")]
    )
    for maker in makers:
        maker = inspect.unwrap(maker) if maker else maker
        if inspect.isfunction(maker) and "<" not in maker.__code__.co_filename:  # what dataclass makes has no source
            for node in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(maker)))):
                if (
                    isinstance(node, ast.Raise)
                    and isinstance(node.exc, ast.Call)
                    and isinstance(node.exc.func, ast.Name)
                ):
                    names.add(node.exc.func.id)
    return names


def size_of(text: str) -> bool:
    """Whether a sentence says how large something is, or where that is said."""
    return bool(SHAPED.search(text) or ELSEWHERE.search(text))


def lacks(name: str, value: Any) -> Iterator[str]:
    """What one docstring lacks, in words."""
    text = inspect.getdoc(value) or ""
    own = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    if not own:
        yield "a docstring"
        return
    if re.search(r"^What `fxstn\.\w+` returns", text):
        return
    said = entries(text)
    for argument, annotation in arguments(value).items():
        if argument not in said and not re.search(rf"\b{argument}\b", text):
            yield f"the argument {argument}"
        elif QUANTITIES.search(annotation) and argument in said and not size_of(said[argument]):
            yield f"shape, range or unit of {argument}: {said[argument]!r}"
    if (missing := {e for e in raised(value) if e not in text}) and not ELSEWHERE.search(text):
        yield f"what raises {', '.join(sorted(missing))}"
    if (
        name.startswith("fxstn.hp.")
        and isinstance(value, type)
        and vars(value).get("numbers")
        and not SOURCE.search(text)
    ):
        yield "the source of the method"


def report() -> list[str]:
    return [f"{name}: {what}" for name, value in (*public(), *methods()) for what in lacks(name, value)]


if __name__ == "__main__":
    lines = report()
    print("\n".join(lines) or "nothing is missing")
    sys.exit(bool(lines))
