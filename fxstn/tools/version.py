"""The version of the library, from a checkout or an installed package."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout


def version() -> str:
    """What the pyproject.toml of the checkout says that Python runs, or else the installed package; "unknown" without both."""
    import tomllib
    from importlib import metadata

    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "fxstn":
            return str(project["version"])
    try:
        return metadata.version("fxstn")
    except metadata.PackageNotFoundError:
        return "unknown"
