"""Files of a run: where they lie, what they are called, what is in them, and when they are left alone."""

from __future__ import annotations

import csv
import errno
import functools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fxstn
from fxstn import hp
from fxstn.bilevel.checkpoint import DamagedError, load_checkpoint, save_checkpoint
from fxstn.bilevel.files import write_text
from fxstn.tools import measure
from tests.runs import make, without_times

with_plots = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra fxstn[plot]")
ODD = ("a,b", 'say "so"', "two\nlines", "=1+2", "_private", "$x$", "$\\frac", "λ → σ", "")


def signalled(number, call=2):
    """Cross entropy that sends a signal to this process in one of its calls."""
    calls = []

    @functools.wraps(F.cross_entropy)  # a run that goes on would tell of another loss
    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return F.cross_entropy(output, target)

    return {"loss_fn": loss_fn, "valid_loss_fn": F.cross_entropy}


# Folders


def test_a_signal_in_the_first_epoch_saves_into_a_folder_that_is_not_there_yet(tmp_path):
    out, whole = tmp_path / "deep" / "run", make().fit(2)
    with pytest.raises(SystemExit):
        make(out, **signalled(signal.SIGTERM)).fit(2)
    assert load_checkpoint(out / "last.pt")["shared"]["history"]["rows"] == []
    assert (out / "history.csv").read_text(encoding="utf-8").split() == ["epoch"]
    assert without_times(make(out, valid_loss_fn=F.cross_entropy).fit(2)) == without_times(whole)


def test_the_folder_of_a_run_stays_where_the_program_changes_its_own(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    runner = make("run", callbacks=[lambda runner: os.chdir(tmp_path / "elsewhere")])
    runner.fit(2)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best.pt",
        "history.csv",
        "last.pt",
        "last.1.pt",
        "start.pt",
    }
    assert not list((tmp_path / "elsewhere").iterdir())
    assert runner.out_dir == tmp_path / "run"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "..")
    runner = make("~/run")
    history = runner.fit(1)
    runner.save("~/files/run.pt")
    runner.load("~/files/run.pt")
    history.to_csv("~/files/h.csv")
    history.to_jsonl("~/files/h.jsonl")
    history.schedule().to_json("~/files/s.json")
    assert fxstn.Schedule.from_json("~/files/s.json").values == history.schedule().values
    names = {"run.pt", "h.csv", "h.jsonl", "s.json"}
    if find_spec("matplotlib"):
        history.plot("~/files/h.png")
        names |= {"h.png"}
    assert {path.name for path in (tmp_path / "files").iterdir()} == names
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [("~no-such-user/run", "begins with a home folder that is not known"), ("a\0b", "has a null character")],
)
def test_a_text_that_is_no_path_is_refused(path, message):
    with pytest.raises(ValueError, match=f"out_dir: .* {message}"):
        make(path)


# Files that are left alone


def test_a_runner_does_not_write_over_what_a_newer_one_wrote(tmp_path):
    first = make(tmp_path)
    first.fit(1)
    assert len(make(tmp_path).fit(3)) == 3
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"last\.pt is not what this runner wrote or read last.* make a new runner, which res"
        ):
            first.fit(2)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(make(tmp_path).fit(4)) == 4


def test_a_runner_goes_on_from_its_own_files_and_from_those_that_it_loads(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    first.fit(1)
    second.fit(2)
    second.save(tmp_path / "last.pt")
    second.fit(3)
    first.load(tmp_path / "last.1.pt")  # back to an earlier epoch, on purpose
    assert len(first.fit(3)) == 3
    for path in tmp_path.iterdir():
        path.unlink()
    assert len(first.fit(4)) == 4
    assert len(make(tmp_path).fit(5)) == 5


def test_save_refuses_the_files_of_a_run_that_is_under_way(tmp_path):
    other = make()

    def save(runner):
        for name in ("last.pt", "last.1.pt", "best.pt"):
            with pytest.raises(
                ValueError, match=rf"in use by another run \(process {os.getpid()} .* or choose another out_dir"
            ):
                other.save(tmp_path / name)
        other.save(tmp_path / "other.pt")
        runner.save(tmp_path / "last.pt")

    assert len(make(tmp_path, callbacks=[save]).fit(2)) == 2
    assert len(make(tmp_path).fit(3)) == 3
    other.save(tmp_path / "last.pt")  # when the run is over
    assert {path.name for path in tmp_path.iterdir()} == {
        "best.pt",
        "history.csv",
        "last.pt",
        "last.1.pt",
        "other.pt",
        "other.1.pt",
        "start.pt",
    }


@pytest.mark.parametrize("name", ["history.csv", "best.pt", "start.pt"])
def test_a_folder_where_a_file_of_the_run_should_be_is_a_warning_and_leaves_no_other_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with (
        nullcontext()
        if name == "start.pt"
        else pytest.warns(fxstn.RunWarning, match="cannot write to .*; training goes on")
    ):
        assert len(make(tmp_path).fit(2)) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert (tmp_path / name).is_dir()


def test_a_text_that_cannot_be_renamed_leaves_no_other_file(tmp_path):
    (tmp_path / "s.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "s.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_read_for_the_moment_is_no_damage(tmp_path, monkeypatch, number):
    make(tmp_path).fit(2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.fstat

    def failing(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fstat", failing)
    with pytest.raises(OSError, match=r"last\.pt cannot be read \(.*\); it is left as it is: mend the cause") as caught:
        make(tmp_path).fit(3)
    monkeypatch.setattr(os, "fstat", real)
    assert caught.value.errno == number
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_process_without_free_file_descriptors_leaves_its_checkpoints_alone(tmp_path):
    make(tmp_path).fit(2)
    names = {path.name for path in tmp_path.iterdir()}
    runner, limits = make(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Too many open files"):
            runner.fit(3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(runner.fit(3)) == 3


def test_a_folder_and_a_link_of_the_name_of_a_checkpoint_keep_their_names(tmp_path):
    out = tmp_path / "run"
    (out / "last.pt").mkdir(parents=True)
    with pytest.raises(OSError, match=r"last\.pt cannot be read \(Is a directory\); it is left as it is"):
        make(out).fit(1)
    (out / "last.pt").rmdir()
    (out / "last.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(OSError, match=r"last\.pt cannot be read \(No such file or directory\); it is left as it is"):
        make(out).fit(1)
    (tmp_path / "gone.pt").write_bytes(b"cut")
    with pytest.raises(
        DamagedError, match=r"last\.pt is not a checkpoint.*it is a link to .*gone\.pt: remove the link"
    ):
        make(out).fit(1)
    assert (out / "last.pt").is_symlink()
    make(tmp_path / "first").fit(1)
    os.replace(tmp_path / "first" / "last.pt", tmp_path / "gone.pt")
    assert len(make(out).fit(2)) == 2
    assert (out / "last.1.pt").is_symlink()


def test_a_failed_write_leaves_no_part_of_a_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint({"a": torch.zeros(10_000)}, tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_reading_a_checkpoint_takes_its_size_in_memory_once(tmp_path):
    save_checkpoint({"a": [torch.ones(4_000_000) for _ in range(4)]}, tmp_path / "last.pt")
    before = measure._reset_peak()
    state = load_checkpoint(tmp_path / "last.pt")
    assert len(state["a"]) == 4
    assert 1e3 * (measure._peak_kb() - before) < 1.3 * (tmp_path / "last.pt").stat().st_size


# Names and numbers


def odd_history():
    rows = [
        {"epoch": epoch, "train_loss": 1.0, "valid_loss": math.nan, "response_loss": math.inf}
        | {name: 0.1 * number + epoch for number, name in enumerate(ODD)}
        for epoch in (1, 2)
    ]
    return fxstn.History(ODD, rows, dict.fromkeys(ODD, 0.5))


def test_a_table_and_lines_of_json_give_any_name_back(tmp_path):
    history = odd_history()
    history.to_csv(tmp_path / "h.csv")
    history.to_jsonl(tmp_path / "h.jsonl")
    with open(tmp_path / "h.csv", newline="", encoding="utf-8") as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [{name: row[name] for name in ODD} for row in read] == [{n: r[n] for n in ODD} for r in history.rows]

    def refused(text):
        raise AssertionError(f"{text} is no JSON")

    lines = (tmp_path / "h.jsonl").read_text(encoding="utf-8").splitlines()
    for line, row in zip(lines, history.rows, strict=True):
        read = json.loads(line, parse_constant=refused)
        assert read == row | {"valid_loss": None, "response_loss": None}
    history.schedule().to_json(tmp_path / "s.json")
    assert fxstn.Schedule.from_json(tmp_path / "s.json").values == history.schedule().values


@with_plots
def test_a_legend_has_every_name_as_it_is():
    from fxstn.bilevel.plots import Panel, figure_of

    for names in (ODD[3:8], ODD):
        figure = figure_of([Panel("$\\frac", {name: [0.1, 0.2] for name in names}, "schedule")], 1, "a test")
        [axis] = figure.axes
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(names)
        figure.draw_without_rendering()


@pytest.mark.parametrize("name", ["epoch", "seconds", "train_loss", "linearization_error", "scale:a", "accuracy"])
def test_a_hyperparameter_of_the_name_of_another_column_is_refused(name):
    with pytest.raises(ValueError, match=f"the hyperparameter '{name}' has the name of a .* of the history"):
        make(hparams=[hp.Scalar(name, 0.5, 0, 1)], loss_fn=fxstn.cross_entropy)


SCRIPT = r"""
import fxstn
from fxstn.tools import cli
name = "\u03bb"
history = fxstn.History((name,), [{"epoch": 1, "valid_loss": 1.0, name: 2.0}], {name: 1.0})
history.to_csv("h.csv"), history.to_jsonl("h.jsonl"), history.schedule().to_json("s.json")
assert fxstn.Schedule.from_json("s.json").values == {name: [1.0, 2.0]}
cli.main(["explain", "torch.nn:Identity"])
print(name)
"""


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1",
                   "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert not result.returncode, result.stderr.decode()
    assert result.stdout.splitlines()[-1] == b"\\u03bb"
    for name in ("h.csv", "h.jsonl", "s.json"):
        assert "λ" in (tmp_path / name).read_text(encoding="utf-8")
