"""Checkpoints of a run, in files or in memory; the way back to them where a loss is no number."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fxstn.bilevel import distributed
from fxstn.bilevel.batches import BatchPreparer
from fxstn.bilevel.checkpoint import DamagedError, latest_checkpoint, load_checkpoint, save_checkpoint, seal_of
from fxstn.bilevel.faults import BadLoss, DivergedError, Monitors, slow_after, warn_caller
from fxstn.bilevel.lock import FolderLock
from fxstn.bilevel.plain import check_readable
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.run_parts import RunParts, copied_state
from fxstn.bilevel.starts import StartWeights
from fxstn.bilevel.state import State
from fxstn.bilevel.updates import Updates
from fxstn.bilevel.writer import BackgroundWriter, write_run
from fxstn.ir.input_errors import as_path

RUN_FILE = re.compile(r"last(\.\d+)?\.pt|(best|start)\.pt|history\.csv")  # names of the files that a run writes


class CheckpointManager:
    """Keeps the newest state of a run, in memory or in files, which a thread writes from a copy of it; restores it.

    parts: of the run.
    starts: the weights that it began with. None: they are not needed.
    device: on which processes agree.
    out_dir: where last.pt, best.pt, start.pt and history.csv go. None: the state is in memory.
    minutes: after which a file is due.
    files: ≥ 1, checkpoints kept.
    memory: whether a state that is in no file is kept in memory.
    """

    def __init__(
        self, parts: RunParts, starts: StartWeights | None, device: torch.device, out_dir: Path | None, minutes: float,
        files: int, memory: bool,
    ) -> None:  # fmt: skip
        self.parts, self.starts, self.device, self.out_dir = parts, starts, device, out_dir
        self.minutes, self.files, self.memory = minutes, files, memory
        self.restorations = 0  # how often the last saved state was restored
        self._state: State | None = None  # the last saved state, where it is in no file, or is not yet
        self._step = -1  # inner steps done when it was saved
        self._time = time.perf_counter()
        self._unwritable = self._trained = self._better = self._writing = False
        self._lock, self._writer = FolderLock(out_dir), BackgroundWriter()
        self._seal: bytes | None = None  # of last.pt, as this run knows it

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other run writes to out_dir; at the end, a signal's included, the files are whole.

        Raises ValueError where another run writes there. Several processes: all must call it.
        """
        distributed.in_first_process(self._lock.acquire)
        with ExitStack() as last:
            last.callback(self._lock.release)
            last.callback(self.finish)  # before the release
            yield

    def due(self) -> bool:
        """Whether it is time for a file. The first call comes after the first steps. Raises TypeError as `begin` then."""
        if not self._trained:
            self._trained = True
            self._check()
        return self.out_dir is not None and time.perf_counter() - self._time > 60 * self.minutes

    def begin(self, better: bool = False) -> None:
        """Keep the state in which training starts, unless it is kept already.

        better: as of `keep`.

        Raises TypeError where files are written and could not hold the state, which would be too late to learn at a resume.
        """
        self._check()
        if self._step != self.parts.counters.steps:
            self.keep(better, write=False)
        if self.starts is not None:
            self.starts.save()

    def _check(self) -> None:
        if self.out_dir is not None:
            check_readable(self.parts.state_dict())

    def keep(self, better: bool = False, write: bool = True) -> None:
        """Keep the state as it is. Several processes: all must call it.

        better: whether the best model is a new one, to be written too.
        write: whether it goes to the files of out_dir.
        """
        self.finish()
        self.restorations, self._state, self._time = 0, None, time.perf_counter()
        self._step, self._better = self.parts.counters.steps, self._better or better
        folder = self.out_dir if write else None
        if write and self.starts is not None:
            self.starts.save()
        state = self.parts.state_dict() if folder is not None or self.memory else {}
        if folder is not None:
            check_readable(state)
        if state and not (self.out_dir is not None and distributed.rank()):
            self._state = state = copied_state(state)
            if folder is not None:
                self._writing = True
                self._writer.start(partial(self._write, state, folder))

    def _write(self, state: State, folder: Path) -> None:
        """The job of the thread; its copy of the state is kept where it cannot be written."""
        write_run(state, self.parts.history.names, folder, self.files, self._better)
        self._note_seal()
        self._state = None

    def finish(self) -> None:
        """Wait until the files are whole that are being written. A warning, once, where they cannot be written."""
        if not self._writing:
            return
        error, self._writing = self._writer.wait(), False
        if not self.memory:
            self._state = None
        if isinstance(error, OSError):
            if not self._unwritable:
                warn_caller(f"cannot write to {self.out_dir}: {error.strerror or error}; training goes on and tries again "
                              "after each epoch; what comes after the last file is lost")  # fmt: skip
        elif error is not None:
            raise error
        else:
            self._better = False
        self._unwritable = error is not None

    def restore(self) -> None:
        """Go back to the state kept last."""
        self.finish()
        self.restorations += 1
        if self.out_dir is None:
            assert self._state is not None
            self.parts.restore(copied_state(self._state))
        else:
            self.parts.restore(distributed.in_first_process(partial(self._last_state, self.out_dir / "last.pt")))

    def _last_state(self, path: Path) -> State:
        return load_checkpoint(path) if self._state is None else copied_state(self._state)

    def resume(self, begun: bool) -> None:
        """Go on from the newest whole file of out_dir, if there is one.

        begun: whether this run has begun already: then it goes on as it is.

        Raises ValueError where it has begun, and another one has written last.pt since then.
        """
        if self.out_dir is None:
            return
        path = self.out_dir / "last.pt"
        if begun:
            self.finish()
            distributed.in_first_process(partial(self._check_seal, path))
            return
        state = distributed.in_first_process(lambda: latest_checkpoint(path))
        if state is not None:
            self.parts.load(state, str(path))
        self._note_seal()

    def _note_seal(self) -> None:
        """Note which last.pt this run may write over."""
        self._seal = None if self.out_dir is None else seal_of(self.out_dir / "last.pt")

    def _check_seal(self, path: Path) -> None:
        if seal_of(path) not in (None, self._seal):
            raise ValueError(f"{path} is not what this runner wrote or read last: another one has trained there since, and "
                             "its epochs would be lost; make a new runner, which resumes from the file")  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write a checkpoint. Several processes: all must call it.

        Raises OSError; TypeError for what is no path, and for a state that could not be read back; ValueError for a folder, and
        for a file of another run that is under way.
        """
        path = as_path(path, "runner.save")
        if path.is_dir():
            raise ValueError(f"runner.save: {path} is a folder; name a file in it, {path / 'last.pt'} say")
        state = self.parts.state_dict()
        check_readable(state)
        distributed.in_first_process(partial(self._save, state, path.absolute()))

    def _save(self, state: State, path: Path) -> None:
        own = self.out_dir is not None and path.parent.resolve() == self.out_dir.resolve()
        needs_lock = bool(RUN_FILE.fullmatch(path.name)) and not (own and self._lock.active)
        lock = FolderLock(path.parent if needs_lock else None)
        lock.acquire()
        try:
            save_checkpoint(state, path, self.files)
        finally:
            lock.release()
        if own and path.name == "last.pt":
            self._note_seal()

    def load(self, path: str | Path) -> None:
        """Go on from a file, which may be older than last.pt: this run writes over what is there now.

        Raises ValueError as `RunParts.load` and where there is no such file, DamagedError, and TypeError for no path.
        """
        path = as_path(path, "runner.load")
        try:
            state = distributed.in_first_process(lambda: load_checkpoint(path))
        except FileNotFoundError as error:
            raise ValueError(
                f"runner.load: there is no file {str(path)!r}; a run writes last.pt into its out_dir"
            ) from error
        except DamagedError as error:
            raise DamagedError(f"{error}; load an older file beside it, last.1.pt say, or train anew") from error
        self.parts.load(state, str(path))
        self._note_seal()


@dataclass
class Recovery:
    """Goes back to the state kept last, `attempts` times in all."""

    checkpoints: CheckpointManager
    problem: BilevelProblem
    updates: Updates
    monitors: Monitors
    prepare: BatchPreparer
    attempts: int

    def go_back(self, fault: BadLoss) -> None:
        """Restore the state kept last, and halve the learning rates that the fault speaks against, anew for each attempt.

        From here on every batch is checked. Raises DivergedError after all attempts, or ValueError where the batch at hand
        holds NaN or an infinity.
        """
        counters, history = self.checkpoints.parts.counters, self.checkpoints.parts.history
        done = counters.rollbacks + 1
        if done > self.attempts:
            self.prepare.check()
            raise DivergedError(self._divergence_message(fault))
        before = self.monitors.warnings
        try:
            self.checkpoints.restore()
        except (OSError, DamagedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DivergedError(f"{self._divergence_message(fault)}; the way back to the last checkpoint is closed: {reason}"
                                ) from error  # fmt: skip
        counters.rollbacks = done
        self.updates.drop_gradients()
        slower = slow_after(fault, self.updates, 0.5**self.checkpoints.restorations)
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in slower)
        text = f"{fault}; back to epoch {len(history)} with lower learning rates: {rates} (attempt {done} of {self.attempts})"
        self.monitors.warnings = [*before, (len(history) + 1, text)]
        self.prepare.check_finite = True
        if not distributed.rank():
            warn_caller(text)

    def _divergence_message(self, fault: BadLoss) -> str:
        values = ", ".join(f"{key}={value:.4g}" for key, value in list(self.problem.values().items())[:20])
        record, out_dir = self.checkpoints.parts.best.record, self.checkpoints.out_dir
        place = f"in {out_dir / 'best.pt'}" if out_dir else "in runner.best"
        best = f"the best model, of epoch {record['epoch']}, is {place}" if record else "no epoch was done"
        return f"{fault} (λ: {values}); {best}; lower the learning rate of the weights or of the response"
