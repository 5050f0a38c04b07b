"""The house: rooms without circles, law 6, small files, names and first lines; and that these checks find what is planted."""

from __future__ import annotations

import ast

import pytest

from tests import house

HOLDS = [
    "entries in fxstn/",
    "import circles",
    "circles of rooms",
    "runtime modules that import a pass",
    "__init__ files that define something",
    "files over 300 lines",
    "functions over 50 lines",
    "': Any'",
    "'type: ignore'",
    "files without a first line",
    "private names that another file imports",
    "private attributes that another file reads",
    "old words",
    "tests that return early",
    "skips without a reason",
]


@pytest.mark.parametrize("name", HOLDS)
def test_there_are_no_more_than_the_house_allows(name):
    most, figure = house.FIGURES[name]
    lines = figure()
    assert len(lines) <= most, "\n".join(lines)


PLANTED = {
    "a.one": "from a import two",
    "a.two": "import b",
    "b": "if TYPE_CHECKING:\n    from c.deep import Thing",
    "c.deep": "def f():\n    from a.one import g",
    "c.alone": "from a.one import f",
}


def planted(**changes: str) -> house.Graph:
    sources = PLANTED | changes
    return {name: set(house.imports(ast.parse(source), set(sources))) for name, source in sources.items()}


def test_a_circle_is_found_also_through_imports_for_types_and_inside_functions():
    assert house.circles(planted()) == ["a.one a.two b c.deep"]
    assert house.circles(planted(b="")) == []
    assert house.circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c", "a"}}) == ["a b", "c d e"]


def test_a_circle_of_rooms_is_found_where_no_modules_are_in_a_circle():
    graph = {"fxstn.a.one": {"fxstn.b.one"}, "fxstn.b.two": {"fxstn.a.two"}, "fxstn.a.two": set(), "fxstn.b.one": set()}
    assert house.circles(graph) == []
    assert house.circles(house.rooms(graph)) == ["fxstn.a fxstn.b"]


def test_law_6_is_about_every_room_that_training_runs_and_every_pass_in_the_folder():
    runtime = {name for name in house.FILES if house.is_runtime(name)}
    for room in ("network", "ops", "hp", "ir", "rules", "bilevel", "integrations", "frontends.live"):
        assert any(house.within(name, (f"fxstn.{room}",)) for name in runtime), room
    for name in ("fxstn.transform", "fxstn.passes.simplify", "fxstn.frontends.symbolic", "fxstn.tools.verify"):
        assert name not in runtime
    graph = {"fxstn.frontends.live.duals": {"fxstn.passes.match"}, "fxstn.frontends.export": {"fxstn.passes.match"}}
    assert house.runtime_imports_of_passes(graph) == ["fxstn.frontends.live.duals → fxstn.passes.match"]


@pytest.mark.parametrize(
    ("thing", "room"),
    [
        ("new frontend", "frontends"),
        ("new decomposition", "frontends.decompositions"),
        ("new pass", "passes"),
        ("new tangent rule", "rules"),
        ("new spec", "hp"),
        ("new framework", "integrations"),
    ],
)
def test_the_first_lines_say_where_a_new_thing_goes(thing, room):
    lines = {name: house.first_line(path).lower() for name, path in house.FILES.items()}
    assert [name for name, line in lines.items() if thing in line] == [f"fxstn.{room}"]


RETURNING = """
def test_that_gives_up(x):
    def helper():
        return x
    if x:
        return
    try:
        assert helper()
    except ValueError:
        return None

def test_that_does_not():
    def helper():
        return 1
    class Net:
        def forward(self):
            return 2
    assert helper() == 1
    pytest.skip("why")
    pytest.skip(reason="why")

def helper():
    return 1
"""


def test_an_early_return_and_a_skip_without_a_reason_are_found_in_tests_alone():
    source = ast.parse(RETURNING)
    assert house.early_returns(source) == ["test_that_gives_up:6", "test_that_gives_up:10"]
    assert house.skips_without_reason(source) == ["skip:19"]


def test_private_attributes_of_another_file_are_found(tmp_path, monkeypatch):
    owner, other = tmp_path / "owner.py", tmp_path / "other.py"
    owner.write_text("class A:\n    def __init__(self):\n        self._state = self._parameters = 1\n")
    other.write_text("def f(a):\n    return a.shown + a._state + a._parameters\n")
    monkeypatch.setattr(house, "FILES", {"owner": owner, "other": other})
    monkeypatch.setattr(house, "short", lambda path: path.name)
    assert house.reached_into() == ["other.py:2 _state"]


def test_old_words_are_found_in_names_but_not_in_text(tmp_path, monkeypatch):
    path = tmp_path / "names.py"
    path.write_text("# the rung\nclass CheckpointKeeper:\n    found, along_dim, _lent = 'rung', 1, 2\n")
    monkeypatch.setattr(house, "FILES", {"names": path})
    monkeypatch.setattr(house, "short", lambda path: path.name)
    assert house.old_words() == ["names.py:2 CheckpointKeeper", "names.py:3 found", "names.py:3 _lent"]
