"""Files that a thread writes while training goes on: whole, of one moment, and before the run ends."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import fxstn
from fxstn.bilevel import checkpoint_manager, plain
from fxstn.bilevel.checkpoint import load_checkpoint
from fxstn.bilevel.writer import BackgroundWriter
from tests.runs import make, same, without_times


@pytest.fixture
def slow(monkeypatch):
    """Files that are begun late."""
    write = checkpoint_manager.write_run

    def late(*arguments):
        time.sleep(0.15)
        write(*arguments)

    monkeypatch.setattr(checkpoint_manager, "write_run", late)


def test_training_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    """The first file waits for the first step of the second epoch."""
    write, stepped = checkpoint_manager.write_run, threading.Event()
    waits = []

    def held(*arguments):
        waits.append(stepped.wait(20))
        write(*arguments)

    monkeypatch.setattr(checkpoint_manager, "write_run", held)
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == 7:  # of five steps of an epoch, with one response step
            stepped.set()
        return F.cross_entropy(output, target)

    make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy).fit(2)
    assert waits == [True, True]


def test_a_file_holds_the_moment_of_its_epoch_whatever_training_does_meanwhile(tmp_path, slow):
    whole, files = make().fit(4), []
    runner = make(tmp_path, callbacks=[lambda runner: files.append(sorted(path.name for path in tmp_path.iterdir()))])
    runner.fit(3)
    assert files[0] == ["run.lock", "start.pt"]
    assert files[1] == [
        "best.pt",
        "history.csv",
        "last.pt",
        "run.lock",
        "start.pt",
    ]  # a callback finds those of the epoch before
    assert not [thread for thread in threading.enumerate() if thread.name == "fxstn-writer"]
    state = load_checkpoint(tmp_path / "last.pt")
    assert len(state["shared"]["history"]["rows"]) == 3
    assert same(state["shared"]["best"]["record"], torch.load(tmp_path / "best.pt", weights_only=True))
    os.replace(tmp_path / "last.1.pt", tmp_path / "last.pt")  # the file of the second epoch
    assert without_times(make(tmp_path).fit(4)) == without_times(whole)


def test_keeping_a_state_takes_the_same_work_after_few_epochs_and_after_many(tmp_path, monkeypatch):
    work: Counter[str] = Counter()

    def count(module, name, values):
        function = getattr(module, name)

        def counted(*arguments, **options):
            work[name] += values(*arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(plain, "_plain_number", lambda value: 1)
    count(plain, "_is_readable", lambda value: len(tree_leaves(value)))
    count(copy, "deepcopy", lambda *arguments: 1)
    runner, results = make(tmp_path), []
    for epochs in (2, 8):
        runner.fit(epochs)
        assert len(runner._tuner.backtracking.points) == epochs
        work.clear()
        runner._checkpoints.keep()
        results.append(dict(work))
        runner._checkpoints.finish()
    assert results[0] == results[1]
    assert min(results[0].values()) > 0
    state = load_checkpoint(tmp_path / "last.pt")["shared"]
    assert same(state["history"]["rows"], runner.history.rows)
    assert same(state["backtracking"], runner._tuner.backtracking.state_dict())


def test_a_signal_ends_the_run_when_its_file_is_whole(tmp_path, slow):
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return F.cross_entropy(output, target)

    with pytest.raises(SystemExit):
        make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy).fit(3)
    state = load_checkpoint(tmp_path / "last.pt")
    assert len(state["shared"]["history"]["rows"]) == 1
    assert state["processes"][0]["means"]["steps"]
    assert not list(tmp_path.glob("*.part"))


def test_going_back_waits_for_the_file(tmp_path, slow):
    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == 11 else 1.0)

    histories = []
    for out in (tmp_path, None):
        calls: list[int] = []
        runner = make(out, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy)
        with pytest.warns(fxstn.RunWarning, match="back to epoch 1"):
            histories.append(without_times(runner.fit(3)))
    assert histories[0] == histories[1]


def test_the_best_model_is_written_when_the_disk_has_room_again(tmp_path, monkeypatch):
    write, full = checkpoint_manager.write_run, [OSError(28, "No space left on device")]

    def failing(*arguments):
        if full:
            raise full.pop()
        write(*arguments)

    monkeypatch.setattr(checkpoint_manager, "write_run", failing)
    runner = make(tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    with pytest.warns(fxstn.RunWarning, match="cannot write to .*No space left"):
        runner.fit(2)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == runner.best["epoch"]


def test_an_error_that_is_none_of_the_disk_ends_the_run(tmp_path, monkeypatch):
    def failing(*arguments):
        raise MemoryError("no memory for a file")

    monkeypatch.setattr(checkpoint_manager, "write_run", failing)
    with pytest.raises(MemoryError, match="no memory"):
        make(tmp_path).fit(3)


def test_a_writer_does_one_job_at_a_time_and_gives_its_error_once(monkeypatch):
    writer, order = BackgroundWriter(), []

    def job(number):
        time.sleep(0.05)
        order.append(number)
        raise OSError(number)

    for number in (1, 2):
        writer.start(lambda number=number: job(number))
    assert order == [1]
    assert writer.wait().args == (2,)
    assert writer.wait() is None

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    writer.start(lambda: job(3))
    assert writer.wait().args == (3,)
