"""What is imported when: the shell's help does without torch, and the package's names come when they are first used."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch

import fxstn
from fxstn.tools import cli
from fxstn.tools.lazy import LazyPackage
from fxstn.tools.models import build_model
from tests.nets import mlp


def python(code: str, *words: object) -> str:
    """What a fresh process prints; -P: the current folder is not searched for modules, as in a script of pip's."""
    command = [sys.executable, "-P", "-W", "error", "-c", code, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "words", [(), *[(name,) for name in cli.COMMANDS]], ids=lambda words: " ".join(words) or "fxstn"
)
def test_help_and_wrong_options_import_no_torch(words):
    code = """
import sys
from fxstn.tools.cli import main
status = []
for last in ("--help", "--no-such-option"):
    try:
        main([*sys.argv[1:], last])
    except SystemExit as end:
        status.append(end.code)
assert status == [0, 2], status
print(sorted({"torch", "torchvision", "numpy", "tabulate"} & set(sys.modules)))
"""
    shown = python(code, *words)
    assert "usage: fxstn" in shown
    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_a_default_once_and_only_where_there_is_one(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert cli.COMMANDS[name].result in shown  # what the command does and leaves
    assert "default: None" not in shown
    assert "default: False" not in shown
    assert not re.search(r"\(default[^)]*\) \(default", shown)


def test_the_names_for_python_are_those_for_type_checkers():
    tree = ast.parse(Path(fxstn.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)  # else it is no public name
    exports = {(module, name) for module, names in fxstn.EXPORTS.items() for name in names}
    assert imports == {("fxstn", "hp"), *exports}


def test_every_name_can_be_read_and_is_listed():
    values = {name: getattr(fxstn, name) for name in fxstn.__all__}
    assert set(values) == {name for name in dir(fxstn) if not name.startswith("__")}
    modules = {name for name, value in values.items() if isinstance(value, type(sys))}
    assert modules == {"hp", "optim"}
    with pytest.raises(AttributeError, match="module 'fxstn' has no attribute 'transfrom'"):
        _ = fxstn.transfrom


def test_the_listed_names_are_the_public_ones_before_any_is_read_and_of_optim_too():
    code = """
import fxstn
print([name for name in dir(fxstn) if not name.startswith("__")] == sorted(fxstn.__all__), "hp" in dir(fxstn))
names = {}
exec("from fxstn.bilevel.optim import *", names)
print(sorted(names.keys() - {"__builtins__"}))
print(dir(fxstn.optim) == sorted(fxstn.optim.__all__), dir(fxstn.hp) == sorted(fxstn.hp.__all__))
"""
    first, second, third = python(code).splitlines()
    assert third == "True True"
    assert first == "True True"
    assert second == "['SettlingAdam', 'generalisation_gap', 'learning_rate', 'set_gap']"


def test_transform_is_the_function_whatever_is_imported_first():
    code = """
import sys
for first in ("from fxstn.tools import bench", "from fxstn import *"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fxstn"]:
        del sys.modules[name]
    exec(first)
    import fxstn
    print(type(fxstn.transform).__name__, fxstn.hp.Dropout.__name__)
"""
    assert python(code).splitlines() == [f"{FunctionType.__name__} Dropout"] * 2


def test_an_error_inside_a_submodule_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "parcel").mkdir()
    (tmp_path / "parcel" / "__init__.py").write_text("EXPORTS = {}\n")
    (tmp_path / "parcel" / "part.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    import parcel

    parcel.__class__ = LazyPackage
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        _ = parcel.part
    with pytest.raises(AttributeError, match="module 'parcel' has no attribute 'whole'"):
        _ = parcel.whole


def test_a_saved_network_is_loaded_by_a_process_that_has_imported_nothing(tmp_path):
    stn = fxstn.transform(mlp()).eval()
    torch.save(stn, tmp_path / "network.pt")
    code = """
import sys, torch
stn = torch.load(sys.argv[1], weights_only=False)
torch.manual_seed(3)
y, dy = stn.train().pushforward(torch.ones(2, 6), delta=torch.ones(len(stn.hparams)))
print(y.tolist(), dy.tolist())
"""
    torch.manual_seed(3)
    y, dy = stn.train().pushforward(torch.ones(2, 6), delta=torch.ones(len(stn.hparams)))
    assert python(code, tmp_path / "network.pt").strip() == f"{y.tolist()} {dy.tolist()}"


def test_a_function_in_the_current_folder_is_found_by_the_shell(tmp_path, monkeypatch, capsys):
    (tmp_path / "models_of_mine.py").write_text(
        "from torch import nn\ndef build(num_classes):\n    return nn.Sequential(nn.Linear(6, num_classes))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "models_of_mine:build"]) == 0
    assert "2 parameters respond" in capsys.readouterr().out


MODELS = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))

def flexible(**options):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, options["num_classes"]))

def needs(width):
    return nn.Linear(width, 2)

def wrong():
    return nn.Linear("a")

def by_position(num_classes, /):
    return nn.Linear(2, num_classes)

model = nn.Linear(2, 2)

class pair(nn.Module):
    def forward(self, a, b):
        return a + b
"""


@pytest.fixture
def mymodels(tmp_path, monkeypatch):
    """A folder with models of one's own, as the current one; gives the name of the module."""
    (tmp_path / f"models_{tmp_path.name}.py").write_text(MODELS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return f"models_{tmp_path.name}"


@pytest.mark.parametrize(("function", "out"), [("make", "7"), ("flexible", "3")])
def test_explain_and_verify_take_a_function_with_or_without_num_classes(mymodels, function, out, capsys):
    words = [f"{mymodels}:{function}", "--num-classes", "3"]
    assert cli.main(["explain", *words]) == 0
    assert "2 parameters respond" in capsys.readouterr().out
    assert cli.main(["verify", *words, "--image-size", "8"]) == 0
    assert build_model(words[0], 3, own_classes=True)[1].out_features == int(out)


@pytest.mark.parametrize("command", ["tune", "bench"])
def test_what_trains_on_data_needs_a_function_that_takes_num_classes(mymodels, command, capsys):
    words = {"tune": ["--model", f"{mymodels}:make"], "bench": [f"{mymodels}:make"]}[command]
    assert cli.main([command, *words]) == 2
    printed = capsys.readouterr().err
    assert f"'{mymodels}:make' takes no num_classes, and its classes must be those of the data" in printed
    assert "write def make(num_classes)" in printed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("needs", "needs needs width; name a function that can be called with num_classes alone"),
        ("model", "model is a Linear; name a function that returns it"),
        ("nowhere", "nowhere: module '"),
        ("pair", "pair: missing a required argument: 'b'; the command gives images alone"),
        ("by_position", "by_position needs num_classes; name a function"),
    ],
)
def test_what_is_no_function_for_a_command_is_refused(mymodels, function, message, capsys):
    assert cli.main(["verify", f"{mymodels}:{function}"]) == 2
    assert message in capsys.readouterr().err


def test_a_module_that_cannot_be_imported_names_what_it_lacks(mymodels, capsys):
    Path(f"{mymodels}_2.py").write_text("import nowhere_at_all\n")
    assert cli.main(["explain", f"{mymodels}_2:make"]) == 2
    assert f"{mymodels}_2 cannot be imported: No module named 'nowhere_at_all'" in capsys.readouterr().err


def test_an_error_of_the_users_code_is_left_as_it_is(mymodels):
    with pytest.raises(TypeError, match="Linear"):
        cli.main(["explain", f"{mymodels}:wrong"])
    Path(f"{mymodels}_3.py").write_text("import torch\ntorch.no_such_name\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        cli.main(["explain", f"{mymodels}_3:make"])


def test_an_installed_package_has_its_types_its_page_and_its_command(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="pip builds the package with the setuptools that is here")
    root = Path(fxstn.__file__).parents[1]
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(root / "fxstn", source / "fxstn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True)
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"fxstn/py.typed", "fxstn/tools/report.html", "bin/fxstn"} <= files
    modules = {str(path.relative_to(source)) for path in (source / "fxstn").rglob("*.py")}
    assert modules <= files
