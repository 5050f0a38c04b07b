"""A lock on the folder of a run: two runs that write to one folder would mix their files."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import weakref
from pathlib import Path

from fxstn.bilevel.faults import warn_caller

try:
    import fcntl
except ImportError:  # Windows, where two runs on a folder go unnoticed
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


class FolderLock:
    """The right of one run to write to a folder.

    folder: made where there is none. None: nothing is locked.

    The lock is the operating system's (flock) on a file in the folder, which says who has it. It ends with the process, SIGKILL
    included. On another machine it acts as far as the file system brings it there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._file: int | None = None
        _LOCKS.add(self)

    @property
    def active(self) -> bool:
        """Whether this run has the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock. Raises ValueError where another run has it.

        Without a lock it goes on with a warning: where the file system has none, or the file cannot be opened though there is
        one. A folder in which it cannot be made cannot hold the files of a run either, which says so when it saves.
        """
        while self.folder is not None and fcntl is not None and self._file is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = _open_to_lock(self.folder / NAME)
            except OSError as error:
                if (self.folder / NAME).exists():
                    _warn(self.folder, error)
                return
            try:
                if not self._lock(file, self.folder):
                    return
                if _is_file(file, self.folder / NAME):
                    self._file, file = file, -1
            finally:
                if file >= 0:
                    os.close(file)

    def _lock(self, file: int, folder: Path) -> bool:
        """Whether the file system has locks. Raises ValueError where another run has this one."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "it does not say which"
            raise ValueError(f"out_dir {folder} is in use by another run ({holder}), and both would write the same files; wait "
                             "until it ends, or choose another out_dir") from None  # fmt: skip
        except OSError as error:
            _warn(folder, error)
            return False
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk: the lock acts without a text
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {platform.node()}, since {now}\n".encode(), 0)
        return True

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._file is not None and self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / NAME).unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close the file: in a child process, where the parent still has the lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open_to_lock(path: Path) -> int:
    """The number of a lock's open file. One of another user may be open to read alone, which is enough to lock it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _warn(folder: Path, error: OSError) -> None:
    warn_caller(f"{folder} cannot be locked ({error.strerror}): start no other run on it, for none would be refused")


_LOCKS: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _is_file(file: int, path: Path) -> bool:
    """Whether an open file is the one of this name; the run before may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
    except OSError:  # for the moment
        return True


def _forget_in_child() -> None:
    """A worker process outlives a killed run by seconds, in which its copy of the file would keep the lock."""
    for lock in list(_LOCKS):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
