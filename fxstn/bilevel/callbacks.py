"""Callbacks of a BilevelRunner: functions of the runner, called after each epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxstn.bilevel import distributed

if TYPE_CHECKING:
    from fxstn.bilevel.runner import BilevelRunner


class TensorBoard:
    """`BilevelRunner(callbacks=[fxstn.TensorBoard(folder)])`: each epoch's row of the history as scalars, at step = epoch.

    Tags: loss/valid, metric/NAME, hyperparameter/NAME, scale/NAME, diagnostics/response_norm, diagnostics/seconds. NaN is left
    out. In an empty folder the rows of before are written too; a run that resumes, or goes back, hides the rows that it writes
    anew. Flushed after each epoch.
    Of several processes the first one writes. Raises ImportError without tensorboard (fxstn[tensorboard]).
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("fxstn.TensorBoard needs tensorboard: pip install 'fxstn[tensorboard]'") from error
        self.folder, self._make = Path(folder), SummaryWriter
        self._writer: Any = None
        self._last = 0  # epoch written last

    def __call__(self, runner: BilevelRunner) -> None:
        if distributed.rank():
            return
        rows = runner.history.rows
        if self._writer is None or rows[-1]["epoch"] <= self._last:
            self.close()
            if any(self.folder.glob("*tfevents*")):
                rows = rows[-1:]
            self._writer = self._make(str(self.folder), purge_step=rows[0]["epoch"])
        else:
            rows = rows[-1:]
        for row in rows:
            self._write(runner, row)
        self._last = rows[-1]["epoch"]
        self._writer.flush()

    def _write(self, runner: BilevelRunner, row: dict[str, Any]) -> None:
        for column, value in row.items():
            if column == "epoch" or not math.isfinite(value):
                continue
            group = runner.history.group(column)
            name = column.removesuffix("_loss") if group == "loss" else column.removeprefix("scale:")
            self._writer.add_scalar(f"{group}/{name}", value, row["epoch"])

    def close(self) -> None:
        """Close the file; a further epoch opens a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
