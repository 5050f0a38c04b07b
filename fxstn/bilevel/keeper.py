"""Keeps a run from being lost: writes its files, resumes from them, and goes back when a loss is no longer a number."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxstn.bilevel import distributed
from fxstn.bilevel.checkpoint import DamagedError, latest_checkpoint, load_checkpoint, save_atomically, save_checkpoint
from fxstn.bilevel.faults import OFFENDERS, BadLoss, DivergedError, RunWarning
from fxstn.bilevel.resume import restore, state_of

if TYPE_CHECKING:
    from fxstn.bilevel.runner import BilevelRunner


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same state in memory of its own, off the accelerator; rows of the history and the best model never change."""
    start, rows = state["history"]
    fixed = {"best": state["best"], "history": (start, list(rows))}
    changing = {key: value for key, value in state.items() if key not in fixed}
    return fixed | tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), changing)


class CheckpointManager:
    """out_dir: None keeps what to go back to in memory. The others are settings of `BilevelRunner`."""

    def __init__(self, runner: BilevelRunner, out_dir: Path | None, minutes: float, keep: int, rollbacks: int) -> None:
        self.runner, self.out_dir = runner, out_dir
        self.minutes, self.files, self.rollbacks = minutes, keep, rollbacks
        self.retries = 0  # of the state kept last
        self._memory: dict[str, Any] | None = None  # that state, where it is in no file
        self._kept_step = -1
        self._unwritable = False
        self._kept_time = time.perf_counter()

    def late(self) -> bool:
        """Whether a file is due."""
        return self.out_dir is not None and time.perf_counter() - self._kept_time > 60 * self.minutes

    def begin(self) -> None:
        """Keep where training starts from, unless that is kept already."""
        if self._kept_step != self.runner.steps:
            self.keep(write=False)

    def keep(self, better: bool = False, write: bool = True) -> None:
        """Keep the state as it is, the file of the best model too if it is better. Several processes: all must call it."""
        self.retries, self._memory, self._kept_time = 0, None, time.perf_counter()
        self._kept_step = self.runner.steps
        written = write and self.out_dir is not None
        state = state_of(self.runner) if written or self.rollbacks else {}
        if written:
            written = not distributed.any_of(not self._write(state, better), self.runner.device)
        if self.rollbacks and not written:
            self._memory = _copied(state)

    def _write(self, state: dict, better: bool) -> bool:
        """Whether that went well; a warning, once, where it does not."""
        if distributed.rank():
            return True
        assert self.out_dir is not None
        try:
            if better:
                save_atomically(self.runner.best, self.out_dir / "best.pt")
            self.runner.history.to_csv(self.out_dir / "history.csv")
            save_checkpoint(state, self.out_dir / "last.pt", self.files)
        except OSError as error:
            if not self._unwritable:
                warnings.warn(f"cannot write to {self.out_dir}: {error.strerror or error}; training goes on and tries again "
                              "after each epoch; what comes after the last file is lost", RunWarning, stacklevel=6)  # fmt: skip
            self._unwritable = True
            return False
        self._unwritable = False
        return True

    def save(self, path: str | Path) -> None:
        state = state_of(self.runner)
        distributed.of_first(lambda: save_checkpoint(state, path, self.files))

    def load(self, path: str | Path) -> None:
        try:
            state = distributed.of_first(lambda: load_checkpoint(path))
        except DamagedError as error:
            raise DamagedError(f"{error}; load an older file beside it, last.1.pt say, or train anew") from error
        restore(self.runner, state, str(path))

    def resume(self) -> None:
        """Go on from the newest whole file of out_dir, if there is one."""
        if self.out_dir is None:
            return
        path = self.out_dir / "last.pt"
        state = distributed.of_first(lambda: latest_checkpoint(path))
        if state is not None:
            restore(self.runner, state, str(path))

    def go_back(self, fault: BadLoss) -> None:
        """To the state kept last, at half the learning rate of that loss's parameters for each attempt from there.

        Raises DivergedError after `rollbacks` attempts in all, ValueError in its place where the batch at hand is to blame.
        """
        runner, done = self.runner, self.runner.rollbacks_done + 1
        if done > self.rollbacks:
            runner._place.check()
            values = ", ".join(f"{key}={value:.4g}" for key, value in list(runner.problem.values().items())[:20])
            where = f"in {self.out_dir / 'best.pt'}" if self.out_dir else "in runner.best"
            best = (
                f"the best model, of epoch {runner.best['epoch']}, is {where}" if runner.best else "no epoch was done"
            )
            raise DivergedError(
                f"{fault} (λ: {values}); {best}; lower the learning rate of the weights or of the response"
            )
        self.retries += 1
        told = runner.warnings
        if self._memory is None:
            assert self.out_dir is not None
            self.load(self.out_dir / "last.pt")
        else:
            restore(runner, _copied(self._memory), "the state kept")
        runner.rollbacks_done = done
        for optimizer in runner.optimizers.values():
            optimizer.zero_grad()  # what the bad loss left
        slowed = [name for name in OFFENDERS[fault.name] if name in runner.optimizers]
        rates = [f"{name} {runner.updates.slow(name, 0.5**self.retries):.3g}" for name in slowed]
        text = (f"{fault}; back to epoch {len(runner.history)} with lower learning rates: {', '.join(rates)} (attempt "
                f"{done} of {self.rollbacks})")  # fmt: skip
        runner._monitors.told = [*told, (len(runner.history) + 1, text)]
        if not distributed.rank():
            warnings.warn(text, RunWarning, stacklevel=3)
