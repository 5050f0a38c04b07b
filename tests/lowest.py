"""The lowest version of each dependency, as constraints for pip: `python tests/lowest.py > constraints.txt` (make oldest)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
WITH_THEM = ("pyparsing<3.3",)  # newer ones warn inside of the lowest matplotlib
APART = ("accelerate", "transformers", "lightning")  # extras of frameworks: tests/oldest.txt has their lowest versions


def requirements() -> list[str]:
    """Every requirement of the library and of its extras, other extras of its own aside."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = (group for name, group in project["optional-dependencies"].items() if name not in APART)
    listed = [*project["dependencies"], *(requirement for group in extras for requirement in group)]
    return sorted({requirement for requirement in listed if not requirement.startswith("fxstn[")})


def lowest(requirement: str) -> str:
    """name>=version → name==version. Raises ValueError for a requirement without a lower bound."""
    match = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?", requirement)
    if match is None:
        raise ValueError(
            f"{requirement!r} of pyproject.toml has no lower bound; write name>=version, a version that tests pass with"
        )
    return f"{match[1]}=={match[2]}"


if __name__ == "__main__":
    print("\n".join([*map(lowest, requirements()), *WITH_THEM]))
