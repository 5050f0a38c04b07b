"""TensorBoard: a callback that logs each epoch of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxstn.bilevel import distributed
from fxstn.bilevel.callbacks import HasHistory
from fxstn.ir.input_errors import as_path

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """`callbacks=[fxstn.TensorBoard(folder)]` of BilevelRunner or fxstn.tune: each row of the history as scalars, step = epoch.

    Tags: loss/valid, metric/NAME, hyperparameter/NAME, scale/NAME, diagnostics/response_norm, diagnostics/seconds.
    NaN is left out. The file is flushed after each epoch.
    In an empty folder, the first call also writes the earlier rows of the history.
    A run that resumes or goes back hides the rows that it writes again.
    Of several processes, only the first one writes.

    Raises ImportError without tensorboard (fxstn[tensorboard]).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder, "TensorBoard").absolute()  # os.chdir in a run moves nothing
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("fxstn.TensorBoard needs tensorboard: pip install 'fxstn[tensorboard]'") from error
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._last = 0  # epoch written last

    def __call__(self, run: HasHistory) -> None:
        if distributed.rank():
            return
        rows = run.history.rows
        writer = self._writer
        if writer is None or rows[-1]["epoch"] <= self._last:
            self.close()
            if any(self.folder.glob("*tfevents*")):
                rows = rows[-1:]
            writer = self._writer = self._make(str(self.folder), purge_step=rows[0]["epoch"])
        else:
            rows = rows[-1:]
        for row in rows:
            for tag, value in run.history.tagged(row).items():
                writer.add_scalar(tag, value, row["epoch"])
        self._last = int(rows[-1]["epoch"])
        writer.flush()

    def close(self) -> None:
        """Close the file; a further epoch opens a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
