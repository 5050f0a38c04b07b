"""The house in figures: rooms, import circles, sizes. `python -m tests.house` prints them; tests/test_house.py checks them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fxstn"
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
RUNTIME = ("fxstn.network", "fxstn.ops", "fxstn.hp", "fxstn.bilevel", "fxstn.ir", "fxstn.frontends.live")
PASSES = ("fxstn.passes", "fxstn.transform")


def entries() -> list[str]:
    """What a listing of fxstn/ shows."""
    return sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")


def imports(path: Path) -> Iterator[str]:
    """The modules of fxstn that a file imports, wherever the statement stands and for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxstn":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)


def arrows() -> dict[str, set[str]]:
    """{module: modules that it imports}."""
    return {name: set(imports(path)) - {name} for name, path in FILES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

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
            component = [stack.pop()]
            while component[-1] != name:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the folders and files of fxstn/ itself."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    result: dict[str, set[str]] = {}
    for name, others in graph.items():
        if name != "fxstn":  # __init__ hands names on
            result.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return result


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def runtime_imports_of_passes() -> list[str]:
    """Law 6: no runtime module imports a pass."""
    return sorted(
        f"{name} → {other}"
        for name, others in arrows().items()
        if within(name, RUNTIME)
        for other in others
        if within(other, PASSES)
    )


def long_files(most: int = 300) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    return [f"{path.relative_to(ROOT.parent)} {length}" for path, length in lengths.items() if length > most]


def long_functions(most: int = 50) -> list[str]:
    result = []
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > most:
                    result.append(f"{path.relative_to(ROOT.parent)}:{node.name} {length}")
    return result


def occurrences(pattern: str) -> int:
    return sum(len(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in FILES.values())


def defining_inits() -> list[str]:
    """Folders whose __init__ defines something in place of handing it on."""
    defined = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return [
        name
        for name, path in FILES.items()
        if path.name == "__init__.py" and any(isinstance(n, defined) for n in ast.parse(path.read_text("utf-8")).body)
    ]


def figures() -> dict[str, list[str] | int]:
    graph = arrows()
    return {
        "entries in fxstn/ (at most 13)": entries(),
        "import circles (0)": [" ".join(circle) for circle in circles(graph)],
        "circles of rooms (0)": [" ".join(circle) for circle in circles(rooms(graph))],
        "arrows between rooms": sum(map(len, rooms(graph).values())),
        "runtime modules that import a pass (0)": runtime_imports_of_passes(),
        "__init__ files that define something (0)": defining_inits(),
        "files over 300 lines (0)": long_files(),
        "functions over 50 lines (at most 2)": long_functions(),
        "': Any' (at most 225)": occurrences(r": Any\b"),
        "'type: ignore' (at most 25)": occurrences(r"type: ignore"),
    }


def main() -> int:
    for name, value in figures().items():
        many = isinstance(value, list)
        print(f"{name}: {len(value) if isinstance(value, list) else value}")
        if many and "entries" not in name:
            print("".join(f"    {line}\n" for line in value), end="")  # type: ignore[union-attr]
    return 0


if __name__ == "__main__":
    sys.exit(main())
