"""Files of a run, written in a thread of their own from a copy of its state, while training goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from fxstn.bilevel.checkpoint import save_atomically, save_checkpoint
from fxstn.bilevel.history import History
from fxstn.bilevel.state import State
from fxstn.bilevel.workers import is_worker_fault


class BackgroundWriter:
    """Does one job at a time in a thread. The interpreter does not end before the job is done."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job, after the one before it, whose error is dropped: call `wait` first."""
        self.wait()
        self._thread = Thread(target=self._run, args=(job,), name="fxstn-writer")
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread left
            if is_worker_fault(error):
                raise
            self._thread = None
            self._run(job)

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            self._error = error

    def wait(self) -> Exception | None:
        """Wait until the job is done. Returns what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error


def write_run(state: State, names: tuple[str, ...], folder: Path, files: int, better: bool) -> None:
    """Write the files of a run: best.pt, history.csv, last.pt. Raises OSError.

    state: of the run, in memory of its own.
    names: of the hyperparameters.
    files: ≥ 1, checkpoints kept.
    better: whether the best model is a new one.
    """
    best = state["shared"]["best"]["record"]
    if better and best is not None:
        save_atomically(best, folder / "best.pt")
    if (table := folder / "history.csv").is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{table.name} is a folder")
    History(names, state["shared"]["history"]["rows"]).to_csv(table)
    save_checkpoint(state, folder / "last.pt", files)
