"""The package: the wheel has every file, an index would take it, and the README's first block runs where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fxstn
from fxstn.tools import version
from tests.lowest import lowest, requirements

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: object, folder: Path) -> str:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*map(str, command)], cwd=folder, env=alone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_is_whole_and_runs_the_readme_in_a_fresh_environment(tmp_path):
    source, dist = tmp_path / "source", tmp_path / "dist"
    shutil.copytree(ROOT / "fxstn", source / "fxstn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", dist, folder=source)
    (wheel,) = dist.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        f"fxstn/{path.relative_to(source / 'fxstn')}" for path in (source / "fxstn").rglob("*") if path.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, folder=tmp_path)

    environment = tmp_path / "environment"
    venv.create(environment)
    python, (site,) = environment / "bin" / "python", environment.glob("lib/*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # which is all that pip does with a wheel of pure Python
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # torch is not downloaded again
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "pasted.py"
    script.write_text(block[1] + "\nprint(fxstn.__file__)\n", encoding="utf-8")
    assert Path(run(python, script, folder=tmp_path).splitlines()[-1]).parent == site / "fxstn"


def test_the_version_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
    [written] = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert fxstn.__version__ == written
    assert "__version__" in dir(fxstn)
    other = tmp_path / "pyproject.toml"
    monkeypatch.setattr(version, "PROJECT", other)
    monkeypatch.setattr(metadata, "version", lambda package: f"{package} as installed")
    assert fxstn.__version__ == "fxstn as installed"
    other.write_text('[project]\nname = "around"\nversion = "7"\n')
    assert fxstn.__version__ == "fxstn as installed"

    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert fxstn.__version__ == "unknown"


def test_every_requirement_has_a_lower_bound():
    constraints = [lowest(requirement) for requirement in requirements()]
    assert "torch==2.9" in constraints
    assert len({constraint.partition("==")[0] for constraint in constraints}) == len(constraints)
    with pytest.raises(ValueError, match=r"'torch' of pyproject\.toml has no lower bound"):
        lowest("torch")


def test_workflows_call_targets_that_make_has():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called: set[str] = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        called |= set(re.findall(r"run: make ([a-z]+)", text))
        for words in re.findall(r"target: (\[.*?\]|\w+)", text):
            called |= set(re.findall(r"\w+", words))
    assert {"lint", "test", "docs", "wheel", "nightly", "integrations", "oldest"} <= called <= targets
