"""The house in figures: rooms, import circles, sizes, words. tests/test_house.py checks them.

`python -m tests.house` prints them, with what is too much; `python -m tests.house "old words"` lists all of one of them.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1] / "fxstn"
EVERYWHERE = [
    path
    for folder in ("fxstn", "tests", "benchmarks", "examples")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
]
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
AT_TRANSFORM_TIME = ("fxstn.transform", "fxstn.loops.tune", "fxstn.passes", "fxstn.frontends", "fxstn.tools")
AT_RUN_TIME = ("fxstn.frontends.live",)  # rooms of AT_TRANSFORM_TIME that run in training all the same

Graph = dict[str, set[str]]  # {module: modules that it imports}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


# Imports


def imports(source: ast.Module, modules: set[str]) -> Iterator[str]:
    """The names of `modules` that a file imports: at its head, inside a function, or for types alone."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from [name for name in (full, node.module) if name in modules][:1]


def arrows() -> Graph:
    return {name: set(imports(tree(path), set(FILES))) - {name} for name, path in FILES.items()}


def rooms(graph: Graph) -> Graph:
    """The same between the folders and files of fxstn/ itself. fxstn/__init__ hands names on and is left out."""
    result: Graph = defaultdict(set)
    for name, others in graph.items():
        if name != "fxstn":
            room, *targets = (".".join(module.split(".")[:2]) for module in (name, *others))
            result[room] |= set(targets) - {room}
    return dict(result)


def circles(graph: Graph) -> list[str]:
    """Strongly connected components of more than one module (Tarjan 1972), one per line."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                components.append(" ".join(sorted(component)))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return components


def is_runtime(name: str) -> bool:
    """Whether training runs a module: all but those that only build graphs or report on them."""
    return name != "fxstn" and (within(name, AT_RUN_TIME) or not within(name, AT_TRANSFORM_TIME))


def runtime_imports_of_passes(graph: Graph) -> list[str]:
    """Law 6: no runtime module imports a pass. The runtime modules and the passes are read from the folders."""
    passes = ("fxstn.passes", "fxstn.transform")
    return sorted(
        f"{name} → {other}" for name in graph if is_runtime(name) for other in graph[name] if within(other, passes)
    )


# Sizes


def entries() -> list[str]:
    """What a listing of fxstn/ shows."""
    return sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")


def long_files(most: int = 300) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    return [f"{short(path)} {length}" for path, length in lengths.items() if length > most]


def long_functions(most: int = 50) -> list[str]:
    result = []
    for path in FILES.values():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > most:
                    result.append(f"{short(path)}:{node.name} {length}")
    return result


def occurrences(pattern: str) -> list[str]:
    """The matches of a regular expression in fxstn/, as "file matches"."""
    counts = {path: len(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in FILES.values()}
    return [short(path) for path, count in counts.items() for _ in range(count)]


# Names and first lines


def defining_inits() -> list[str]:
    """Folders whose __init__ defines a function or a class, where it should only hand names on."""
    definitions = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return [
        short(path)
        for path in FILES.values()
        if path.name == "__init__.py" and any(isinstance(node, definitions) for node in tree(path).body)
    ]


def first_line(path: Path) -> str:
    return (ast.get_docstring(tree(path)) or "").partition("\n")[0]


def without_first_line() -> list[str]:
    """Files whose docstring does not say in its first line, a sentence or a heading, what they hold."""
    return [short(path) for path in EVERYWHERE if len(first_line(path).split()) < 3]


def imported_private_names() -> list[str]:
    """Names with an underscore that another file of fxstn imports: what two files use is public."""
    return [
        f"{short(path)}: {alias.name}"
        for path in FILES.values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxstn")
        for alias in node.names
        if alias.name.startswith("_")
    ]


def private_names(path: Path) -> set[str]:
    """Names with one underscore that a file defines: functions, classes, and attributes that it assigns."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def reached_into() -> list[str]:
    """Attributes with an underscore that a file reads and that only other files of fxstn define."""
    defined = {path: private_names(path) for path in FILES.values()}
    everywhere = set().union(*defined.values())
    return [
        f"{short(path)}:{node.lineno} {node.attr}"
        for path in FILES.values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in everywhere - defined[path] - OF_TORCH
    ]


OF_TORCH = {*dir(torch.Tensor), *dir(torch.nn.LSTM(1, 1))}

OLD_WORDS = {  # parts of names: each has a standard word now (CHANGELOG.md has the table)
    *("rung", "rungs", "refusals", "climb", "climbs", "misfit", "fitting", "fidelity", "aside", "asides", "told"),
    *("keeper", "tally", "placement", "wary", "lent", "borrowed", "lending", "watch", "watched"),
    *("rivals", "witness", "widened", "opened"),
}
OLD_NAMES = {
    *("Stream", "Streams", "Quantity", "Number", "Terms", "Reads", "Reading", "Losses", "nothing_lost", "by_value"),
}
PARTICIPLES = {"found", "made", "given", "told", "taken", "kept", "asked", "wanted", "held", "followed"}


def words(name: str) -> set[str]:
    """The words of a name: of `_watched_inputs` watched and inputs, of `CheckpointManager` checkpoint and manager."""
    return set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_"))


def old_words() -> list[str]:
    """Names in fxstn/ that use a word of before, or a past participle for a thing."""
    result = []
    for path in FILES.values():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            name = token.string.strip("_")
            if token.type == tokenize.NAME and (words(name) & OLD_WORDS or name in OLD_NAMES | PARTICIPLES):
                result.append(f"{short(path)}:{token.start[0]} {token.string}")
    return result


# Tests


def own_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a function, those of functions and classes inside it left out."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from own_statements(getattr(statement, field, []))


def functions_of_tests(source: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in source.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def early_returns(source: ast.Module) -> list[str]:
    """Tests that return: what comes after is not checked, and the test passes all the same."""
    return [
        f"{function.name}:{statement.lineno}"
        for function in functions_of_tests(source)
        for statement in own_statements(function.body)
        if isinstance(statement, ast.Return)
    ]


def skips_without_reason(source: ast.Module) -> list[str]:
    """Calls of skip, skipif, importorskip and xfail that do not say why."""
    names = {"skip", "skipif", "importorskip", "xfail"}
    return [
        f"{node.func.attr}:{node.lineno}"
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
        if not any(keyword.arg == "reason" for keyword in node.keywords)
    ]


def in_tests(check: Callable[[ast.Module], list[str]]) -> list[str]:
    paths = sorted(Path(__file__).parent.glob("test_*.py"))
    return [f"{short(path)}:{line}" for path in paths for line in check(tree(path))]


# The figures

Figure = Callable[[], list[str]]

FIGURES: dict[str, tuple[int, Figure]] = {
    "entries in fxstn/": (15, entries),
    "import circles": (0, lambda: circles(arrows())),
    "circles of rooms": (0, lambda: circles(rooms(arrows()))),
    "runtime modules that import a pass": (0, lambda: runtime_imports_of_passes(arrows())),
    "__init__ files that define something": (0, defining_inits),
    "files over 300 lines": (0, long_files),
    "functions over 50 lines": (2, long_functions),
    "': Any'": (225, lambda: occurrences(r": Any\b")),
    "'type: ignore'": (25, lambda: occurrences(r"type: ignore")),
    "files without a first line": (0, without_first_line),
    "private names that another file imports": (0, imported_private_names),
    "private attributes that another file reads": (0, reached_into),
    "old words": (0, old_words),
    "tests that return early": (0, lambda: in_tests(early_returns)),
    "skips without a reason": (0, lambda: in_tests(skips_without_reason)),
}  # {what is counted: (at most so many, what lists them)}


def main() -> None:
    for name, (most, figure) in FIGURES.items():
        if name not in (sys.argv[1:] or FIGURES):
            continue
        lines = figure()
        print(f"{name}: {len(lines)} (at most {most})")
        if sys.argv[1:] or most < len(lines) < 100:
            for line, count in Counter(lines).items():
                print(f"    {line}" + f" × {count}" * (count > 1))


if __name__ == "__main__":
    main()
