"""Files of a run: written atomically and with a checksum; where the newest is damaged, the one before it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.files import atomic_file
from fxstn.bilevel.state import State

FORMAT = 20
# A file: what torch.save writes, the format in 4 digits, the SHA-256 of all that, and a mark.
_MARK = b"fxstn-run"
_DIGITS, _SEAL = 4, hashlib.sha256().digest_size + len(_MARK)
_PIECE = 1 << 20  # bytes read at once


class DamagedError(ValueError):
    """A file that is not, or no longer, a checkpoint."""


class _HashingFile:
    """Writes to a file, adds what it writes to a checksum, and keeps the error that torch.save would hide."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        try:
            left = memoryview(data)
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write(state: Mapping[str, object], path: Path, checksum: bool) -> None:
    """torch.save to a file, and wait until it is on the disk. Raises OSError."""
    with open(path, "wb", buffering=0) as raw:  # a process forked meanwhile has nothing to flush
        file = _HashingFile(raw)
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise file.error or error from error
        if checksum:
            file.write(f"{FORMAT:0{_DIGITS}d}".encode())
            file.write(file.sum.digest() + _MARK)
        os.fsync(raw.fileno())


def save_atomically(state: Mapping[str, object], path: str | Path) -> None:
    """torch.save to a temporary file in the same folder, then rename it: the old file stays whole until the new one is."""
    with atomic_file(Path(path)) as temporary:
        _write(state, temporary, checksum=False)


def _older(path: Path, age: int) -> Path:
    """last.pt, last.1.pt, last.2.pt, …"""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def _exists(path: Path) -> bool:
    """Whether there is such a name, a link to nowhere included. Raises OSError where the folder cannot be read."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def save_checkpoint(state: State, path: str | Path, keep: int = 1) -> None:
    """Write a checkpoint with its checksum. Those before become last.1.pt and so on.

    keep: ≥ 1, files in all.
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        _write(state, temporary, checksum=True)
        for age in range(keep - 1, 0, -1):
            if _exists(_older(path, age - 1)):
                os.replace(_older(path, age - 1), _older(path, age))


def _check_seal(file: IO[bytes], path: Path) -> None:
    """Read a file once, in pieces. Raises as `load_checkpoint`."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise DamagedError(f"{path} is empty")
    file.seek(max(0, size - _SEAL - _DIGITS))
    version, seal = file.read(_DIGITS), file.read()
    if not seal.endswith(_MARK) or size <= _SEAL + _DIGITS:
        raise DamagedError(f"{path} is not a checkpoint of fxstn, or its end is missing")
    file.seek(0)
    contents, left = hashlib.sha256(), size - _SEAL
    while left and (piece := file.read(min(left, _PIECE))):
        contents.update(piece)
        left -= len(piece)
    if contents.digest() != seal[: -len(_MARK)]:
        raise DamagedError(f"{path} is damaged: its contents do not have the checksum that was written with them")
    if int(version) != FORMAT:
        raise ValueError(f"{path} was written in format {int(version)} by another version of fxstn, this one reads {FORMAT}; "
                         "remove it, or choose another out_dir")  # fmt: skip
    file.seek(0)


def seal_of(path: Path) -> bytes | None:
    """The end of a file, which has the checksum of a checkpoint's contents; None where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _SEAL))
            return file.read()
    except OSError:
        return None


def load_checkpoint(path: str | Path) -> State:
    """The state in a file. Its tensors are read straight into their memory: this takes as much as the file is large.

    Raises DamagedError where the file is no checkpoint, or does not have the checksum of its contents; ValueError where another
    version of fxstn wrote it; OSError where it cannot be read, which says nothing about its contents.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _check_seal(file, path)
            state: State = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read ({error.strerror or error})") from error
    return state


def _rename_damaged(file: Path, reason: DamagedError) -> str:
    """Rename a damaged file to NAME.broken; returns what to say of it.

    Raises DamagedError where the name is a link, OSError where it cannot be renamed.
    """
    if file.is_symlink():
        raise DamagedError(f"{reason}; it is a link to {os.readlink(file)}: remove the link to resume from the file before "
                           "it") from reason  # fmt: skip
    broken = file.with_name(file.name + ".broken")
    try:
        os.replace(file, broken)
    except OSError as error:
        raise OSError(
            error.errno, f"{reason}; it cannot be renamed ({error.strerror}): move it away, and run again"
        ) from error
    return f"{reason}; it is now {broken.name}"


def latest_checkpoint(path: str | Path) -> State | None:
    """The newest whole checkpoint among last.pt, last.1.pt, …; None where there is no file at all.

    A damaged file is renamed to NAME.broken, with a warning. A file that cannot be read keeps its name.

    Raises DamagedError when all files were damaged, or a link leads to a damaged one; OSError where a file cannot be read.
    """
    path = Path(path)
    reasons: list[str] = []
    for file in [_older(path, age) for age in range(100) if _exists(_older(path, age))]:
        try:
            state = load_checkpoint(file)
        except DamagedError as error:
            reasons.append(_rename_damaged(file, error))
            continue
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; it is left as it is: mend the cause and run again, or move it away "
                          "to resume from the file before it") from error  # fmt: skip
        for reason in reasons:
            warn_caller(f"{reason}; the run resumes from {file.name}, saved before it", UserWarning)
        return state
    if reasons:
        raise DamagedError(f"{'; '.join(reasons)}; no whole checkpoint is left: run again to start anew")
    return None
