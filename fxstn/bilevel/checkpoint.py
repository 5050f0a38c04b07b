"""Files of a run: written atomically and with a checksum; where the newest is damaged, the one before it is read."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.state import State

FORMAT = 10
# A file: what torch.save writes, the format in 4 digits, the SHA-256 of all that, and a mark.
_MARK = b"fxstn-run"
_SEAL = hashlib.sha256().digest_size + len(_MARK)


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
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_temporary(state: Mapping[str, object], path: Path, checksum: bool) -> Path:
    """A temporary file beside `path` that holds the state, on the disk. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as raw:
        file = _HashingFile(raw)
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise file.error or error from error
        if checksum:
            file.write(f"{FORMAT:04d}".encode())
            raw.write(file.sum.digest() + _MARK)
        raw.flush()
        os.fsync(raw.fileno())
    return temporary


def save_atomically(state: Mapping[str, object], path: str | Path) -> None:
    """torch.save to a temporary file in the same folder, then rename it: the old file stays whole until the new one is."""
    os.replace(_write_temporary(state, Path(path), checksum=False), path)


def _older(path: Path, age: int) -> Path:
    """last.pt, last.1.pt, last.2.pt, …"""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def save_checkpoint(state: State, path: str | Path, keep: int = 1) -> None:
    """Write a checkpoint with its checksum. Those before become last.1.pt and so on.

    keep: ≥ 1, files in all.
    """
    path = Path(path)
    temporary = _write_temporary(state, path, checksum=True)
    for age in range(keep - 1, 0, -1):
        if _older(path, age - 1).exists():
            os.replace(_older(path, age - 1), _older(path, age))
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> State:
    """The state in a file.

    Raises DamagedError where the file is no checkpoint, or does not have the checksum of its contents; ValueError where another
    version of fxstn wrote it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
    if not data:
        raise DamagedError(f"{path} is empty")
    sealed, seal = memoryview(data)[:-_SEAL], data[-_SEAL:]
    if not seal.endswith(_MARK) or len(sealed) <= 4:
        raise DamagedError(f"{path} is not a checkpoint of fxstn, or its end is missing")
    if hashlib.sha256(sealed).digest() != seal[: -len(_MARK)]:
        raise DamagedError(f"{path} is damaged: its contents do not have the checksum that was written with them")
    payload, version = sealed[:-4], int(sealed[-4:])
    if version != FORMAT:
        raise ValueError(f"{path} was written in format {version} by another version of fxstn, this one reads {FORMAT}; "
                         "remove it, or choose another out_dir")  # fmt: skip
    state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def latest_checkpoint(path: str | Path) -> State | None:
    """The newest whole checkpoint among last.pt, last.1.pt, …; None where there is no file at all.

    A damaged file is renamed to NAME.broken, with a warning. Raises DamagedError when all files were damaged.
    """
    path = Path(path)
    files = [_older(path, age) for age in range(100) if _older(path, age).exists()]
    reasons = []
    for file in files:
        try:
            state = load_checkpoint(file)
        except DamagedError as error:
            broken = file.with_name(file.name + ".broken")
            os.replace(file, broken)
            reasons.append(f"{error}; it is now {broken.name}")
            continue
        for reason in reasons:
            warn_caller(f"{reason}; the run resumes from {file.name}, saved before it", UserWarning)
        return state
    if reasons:
        raise DamagedError(f"{'; '.join(reasons)}; no whole checkpoint is left: run again to start anew")
    return None
