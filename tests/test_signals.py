"""Signals to all processes of a run, and two runs on one folder."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.checkpoint import load_checkpoint
from fxstn.bilevel.lock import NAME, FolderLock
from fxstn.bilevel.plain import check_readable
from fxstn.bilevel.workers import WorkerPass, is_worker_fault
from tests.nets import mlp
from tests.processes import CONTEXT
from tests.runs import make, without_times


class Slow(Dataset):
    """Draws in its worker process, and takes its time."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        time.sleep(0.005)
        return torch.full((6,), i / 24) + torch.randn(6), torch.tensor(i % 3)


class Stream(IterableDataset):
    """The same in the order of the numbers, half of it from each of two workers."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        data = Slow()
        return (data[i] for i in range(24) if worker is None or i % 2 == worker.id)


def seeded(worker):
    """A worker_init_fn of the user."""
    torch.manual_seed(100 + worker)


SETTINGS = {"fork": {"worker_init_fn": seeded}, "spawn": {}, "forkserver": {}, "stream": {}}


def make_slow(out, kind, loss_fn=F.cross_entropy, metric=fxstn.accuracy):
    torch.manual_seed(0)
    context = kind if kind in ("spawn", "forkserver") else "fork"
    settings = {"num_workers": 2, "multiprocessing_context": context, **SETTINGS[kind]}
    data = {"dataset": Stream()} if kind == "stream" else {"dataset": Slow(), "shuffle": True}
    return fxstn.BilevelRunner(
        fxstn.transform(mlp(), [hp.Dropout("2", init=0.3)]),
        loss_fn,
        DataLoader(batch_size=4, **data, **settings),
        DataLoader(Slow(), 4, **settings),
        checkpoints=fxstn.CheckpointSettings(out_dir=out),
        progress=False,
        hyper=fxstn.HyperSettings(train_steps=2),
        valid_loss_fn=F.cross_entropy,
        metrics={"metric": metric},
    )


def train_slowly(out, kind, moment, pipe):
    """A run in a process group of its own, which says when a moment of its second epoch has come."""
    os.setsid()
    torch.set_num_threads(1)
    calls = []

    def noticed(function, *arguments):
        calls.append(0)
        if len(calls) == {"training": 13, "evaluation": 8}[moment]:  # of 12 calls of an epoch, of six of an evaluation
            pipe.send("now")
            time.sleep(0.3)
        return function(*arguments)

    argument, function = {"training": ("loss_fn", F.cross_entropy), "evaluation": ("metric", fxstn.accuracy)}[moment]
    named = functools.wraps(function)(lambda output, target: noticed(function, output, target))
    make_slow(out, kind, **{argument: named}).fit(3)


def exit_code(out, kind, moment, number):
    """That of a run whose processes all get a signal at a moment."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=train_slowly, args=(out, kind, moment, theirs))
    process.start()
    theirs.close()
    assert ours.poll(120)
    ours.recv()
    os.killpg(process.pid, number)
    process.join(60)
    process.kill()
    return process.exitcode


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("kind", "moment", "number"),
    [("fork", "evaluation", signal.SIGTERM), ("stream", "training", signal.SIGINT),
     nightly("forkserver", "evaluation", signal.SIGTERM), nightly("spawn", "training", signal.SIGTERM)],
)  # fmt: skip
def test_a_signal_to_all_processes_saves_and_the_run_goes_on_from_there(tmp_path, kind, moment, number):
    assert exit_code(tmp_path, kind, moment, number) == (1 if number == signal.SIGINT else 128 + signal.SIGTERM)
    state = load_checkpoint(tmp_path / "last.pt")
    assert (len(state["shared"]["history"]["rows"]), state["processes"][0]["means"]["steps"] > 0) == {
        "training": (1, True),
        "evaluation": (2, False),
    }[moment]
    whole = make_slow(None, kind).fit(2)
    assert without_times(make_slow(tmp_path, kind).fit(2)) == without_times(whole)


def end_abruptly(out, first):
    """A run whose workers a signal has ended: SIGKILL, which none can outlive. Some are dead at once, the others later."""
    calls = []

    def kill(workers):
        for worker in workers:
            worker.kill()

    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == 15:  # of 12 of an epoch
            kill(workers_by_age()[first])
            os.kill(os.getpid(), signal.SIGTERM)
        return F.cross_entropy(output, target)

    run = make_slow(out, "fork", loss_fn)
    try:
        run.fit(3)
    finally:
        kill(workers_by_age())
        time.sleep(0.5)


def workers_by_age():
    return sorted(multiprocessing.active_children(), key=lambda worker: worker.pid)


@pytest.mark.parametrize("first", [slice(None), slice(1), slice(-1, None)], ids=["all", "oldest", "newest"])
def test_workers_that_end_at_the_signal_all_the_same_end_the_run_and_leave_its_last_file(tmp_path, first):
    process = CONTEXT.Process(target=end_abruptly, args=(tmp_path, first))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert len(load_checkpoint(tmp_path / "last.pt")["shared"]["history"]["rows"]) == 1


def broken():
    """The batches of a worker whose socket has closed."""
    raise ConnectionResetError(104, "Connection reset by peer")
    yield


@pytest.mark.parametrize("dead", [True, False])
def test_a_batch_that_breaks_off_names_the_worker_that_died(dead):
    """The socket of a process closes before the process has ended."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.3 if dead else 60,))
    worker.start()
    with pytest.raises((RuntimeError, ConnectionResetError)) as caught:
        next(WorkerPass(broken(), [worker]))
    worker.kill()
    assert is_worker_fault(caught.value) == dead
    if dead:
        assert f"worker {worker.pid} ended" in str(caught.value)


DEATH = "DataLoader worker (pid 1) is killed by signal: Killed."  # torch's words, between any two instructions


def test_a_death_of_a_worker_while_a_state_is_checked_is_not_the_states(monkeypatch):
    def dies(*arguments, **options):
        raise RuntimeError(DEATH)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        check_readable({"shared": {"steps": 1}})


def fail_at_a_signal(form):
    """A step in which the signal comes and a worker's death is read, as torch's error or as one that it led to."""
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        raise RuntimeError(DEATH)
    except RuntimeError as error:
        if form == "itself":
            raise
        raise TypeError("must return one number") from (error if form == "cause" else None)


@pytest.mark.parametrize("form", ["itself", "cause", "context"])
def test_a_death_of_a_worker_at_the_signal_ends_the_run_whatever_it_became(tmp_path, form, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run = make(tmp_path, callbacks=[lambda runner: fail_at_a_signal(form)])
    with pytest.warns(UserWarning, match="ended at the signal"), pytest.raises(SystemExit):
        run.fit(1)


@pytest.mark.parametrize("noted", [True, False])
def test_a_second_worker_may_die_at_the_end_of_any_context(tmp_path, noted, monkeypatch):
    """Its error then comes in place of the first one's. Without a signal it is raised, as ever."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    manager = contextlib._GeneratorContextManager
    end = manager.__exit__

    def dies(self, kind, error, trace):
        if error is not None and self.func.__name__ == "_note_signals":
            raise RuntimeError(DEATH)
        return end(self, kind, error, trace)

    def fails(runner):
        monkeypatch.setattr(manager, "__exit__", dies)
        if noted:
            fail_at_a_signal("itself")
        raise RuntimeError(DEATH)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit if noted else RuntimeError):
            make(tmp_path, callbacks=[fails]).fit(1)
    monkeypatch.undo()
    gc.collect()
    assert any("ended at the signal" in str(warning.message) for warning in caught) == noted
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@contextlib.contextmanager
def handlers(of):
    before = {number: signal.signal(number, handler) for number, handler in of.items()}
    try:
        yield
        assert {number: signal.getsignal(number) for number in of} == of
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored(tmp_path):
    """A shell starts `script &` with SIGINT ignored."""
    with handlers({signal.SIGINT: signal.SIG_IGN}):
        run = make(tmp_path, callbacks=[lambda runner: os.kill(os.getpid(), signal.SIGINT)])
        assert len(run.fit(2)) == 2


def test_a_handler_of_ones_own_is_called_when_the_run_has_saved(tmp_path):
    calls = []

    def own(number, frame):
        calls.append((number, (tmp_path / "last.pt").exists()))

    with handlers({signal.SIGTERM: own}):
        run = make(tmp_path, callbacks=[lambda runner: os.kill(os.getpid(), signal.SIGTERM)])
        with pytest.raises(SystemExit):
            run.fit(2)
    assert calls == [(signal.SIGTERM, True)]
    assert len(run.history) == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_either_kind_ends_the_run_at_once(tmp_path, second):
    def signals(runner):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
        raise AssertionError("it went on")

    def own(number, frame):
        raise InterruptedError

    with handlers({signal.SIGTERM: own, signal.SIGINT: own}), pytest.raises(InterruptedError):
        make(tmp_path, callbacks=[signals]).fit(2)


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    stop = make(tmp_path)._stop
    with pytest.raises(SystemExit):
        stop.run(True, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.signal is None


# Two runs


def test_a_second_run_on_a_folder_is_refused_and_one_after_the_other_is_not(tmp_path):
    out = tmp_path / "run"

    def second(runner):
        with pytest.raises(
            ValueError, match=rf"run is in use by another run \(process {os.getpid()} on .*choose another"
        ):
            make(out).fit(2)
        raise KeyError("a fault of the user")

    with pytest.raises(KeyError):
        make(out, callbacks=[second]).fit(2)
    assert not out.joinpath(NAME).exists()
    assert len(make(out).fit(1)) == 1
    assert {path.name for path in out.iterdir()} == {"best.pt", "history.csv", "last.pt", "start.pt"}


def hold(folder, pipe):
    lock = FolderLock(folder)
    lock.acquire()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    worker.start()
    lock.acquire()
    pipe.send(worker.pid)
    time.sleep(20)


def test_the_lock_of_a_killed_run_is_free_though_its_workers_live(tmp_path):
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    worker = ours.recv()
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        lock.acquire()
    process.kill()
    process.join()
    lock.acquire()
    os.kill(worker, signal.SIGKILL)  # it was there until now
    assert f"process {os.getpid()} on" in (tmp_path / NAME).read_text(encoding="utf-8")
    lock.release()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_user_can_be_read_alone_and_is_a_lock(tmp_path, monkeypatch):
    first, second, whole = FolderLock(tmp_path), FolderLock(tmp_path), os.open

    def opened(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return whole(path, flags, *mode)

    first.acquire()
    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on"):
        second.acquire()
    first.release()
    (tmp_path / NAME).touch()  # left behind
    second.acquire()
    assert second.active
    second.release()


def test_a_lock_that_cannot_be_opened_is_a_warning(tmp_path):
    (tmp_path / NAME).mkdir()
    lock = FolderLock(tmp_path)
    with pytest.warns(fxstn.RunWarning, match=r"cannot be locked \(Is a directory\): start no other run on it"):
        lock.acquire()
    assert not lock.active


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    import errno
    import fcntl

    def flock(file, operation):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(fxstn.RunWarning, match=r"cannot be locked \(.*\): start no other run on it"):
        assert len(make(tmp_path).fit(1)) == 1


def test_a_signal_in_a_run_within_a_run_ends_both_and_both_have_saved(tmp_path):
    """The handler of one's own is called once, when the outer one has saved."""
    calls = []

    def inner(runner):
        if len(runner.history) == 2:
            folder = tmp_path / "inner"
            make(folder, callbacks=[lambda run: os.kill(os.getpid(), signal.SIGTERM)]).fit(5)
            calls.append(len(load_checkpoint(folder / "last.pt")["shared"]["history"]["rows"]))

    def own(number, frame):
        calls.append(number)

    with handlers({signal.SIGTERM: own}), pytest.raises(SystemExit):
        make(tmp_path / "outer", callbacks=[inner]).fit(5)
    assert calls == [1, signal.SIGTERM]
    assert len(load_checkpoint(tmp_path / "outer" / "last.pt")["shared"]["history"]["rows"]) == 2


def test_workers_end_at_once_when_a_run_is_dropped(monkeypatch):
    """torch waits for each worker of an iterator that is collected with its queues: five seconds, and here a minute."""
    run = make_slow(None, "fork")
    run.fit(1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)
    run.itself = run  # a cycle
    assert multiprocessing.active_children()
    start = time.perf_counter()
    del run
    gc.collect()
    assert not multiprocessing.active_children()
    assert time.perf_counter() - start < 30
