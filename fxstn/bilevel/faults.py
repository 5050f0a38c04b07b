"""What can go wrong in a run: losses that are no longer numbers, signals that ask it to end, signs of trouble to come."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

EXPLODED = 1e4  # times as large as at first, or as 1: no longer a loss that training can bring down
AT_BOUND = 0.01  # share of the range from its end
PERSISTENT = 3  # epochs in a row before a sign counts
OFFENDERS = {  # the optimizers whose rates a bad loss speaks against
    "train_loss": ("optimizer",),
    "valid_loss": ("optimizer",),
    "response_loss": ("response_optimizer",),
    "hyper_loss": ("response_optimizer", "hyper_optimizer"),
}


class DivergedError(RuntimeError):
    """A loss became NaN, infinite or huge, and again after the run went back. The best model so far is kept."""


class RunWarning(UserWarning):
    """A sign that a run goes wrong, with the remedy."""


class BadLoss(Exception):  # caught by the runner, which goes back or raises DivergedError
    """name: of the loss; where: epoch and step."""

    def __init__(self, name: str, value: float, where: str) -> None:
        super().__init__(f"{name} became {value:.6g} in {where}")
        self.name = name


class LossGuard:
    """Knows each loss's first value; raises BadLoss for one that is not finite or `EXPLODED` times that."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}

    def check(self, losses: dict[str, float], where: str) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss) or abs(loss) > EXPLODED * max(1.0, abs(self.first.setdefault(name, loss))):
                raise BadLoss(name, loss, where)


def check_batch(batch: tuple[Any, Any], where: str) -> None:
    """Raises ValueError when a batch holds NaN or an infinity."""
    for part, value in zip(("inputs", "target"), batch, strict=True):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
                bad = (
                    (~torch.isfinite(leaf.reshape(len(leaf), -1) if leaf.dim() else leaf[None, None])).any(1).nonzero()
                )
                raise ValueError(f"{where} has {part} that are NaN or infinite (row {int(bad[0])} of shape "
                                 f"{tuple(leaf.shape)}); mend or drop these examples")  # fmt: skip


class Stop:
    """Asked for by SIGTERM or Ctrl-C: the run saves and ends at the next step. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def on_signals(self, wanted: bool) -> Iterator[None]:
        """Python lets only the main thread handle signals; elsewhere they act as ever."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (int(signal.SIGINT), int(signal.SIGTERM))}

        def note(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(number, before[number] or signal.SIG_DFL)

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def end(self) -> None:
        """Raise what the signal would have raised, or SystemExit with the shell's status for SIGTERM."""
        number, self.signal = self.signal, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(number or signal.SIGTERM))


def share_of_range(value: float, low: float, high: float) -> float:
    """Where in its range a value is; in log space where the range spans a factor of 100."""
    if low > 0 and high >= 100 * low:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


class Monitors:
    """Reads each epoch's row and warns, once a run and sign, of what goes wrong in this method."""

    def __init__(self, ranges: dict[str, tuple[float, float]]) -> None:
        self.ranges = {name: (low, high) for name, (low, high) in ranges.items() if math.isfinite(high - low)}
        self.said: set[str] = set()
        self.told: list[tuple[int, str]] = []  # (epoch, text) of every warning of the run, for reports
        self._epoch = 0

    def _warn(self, sign: str, text: str) -> None:
        if sign not in self.said:
            self.said.add(sign)
            self.told.append((self._epoch, text))
            warnings.warn(text, RunWarning, stacklevel=6)

    def read(self, rows: Sequence[dict[str, Any]]) -> None:
        recent, epoch = rows[-PERSISTENT:], rows[-1]["epoch"]
        self._epoch = epoch
        if len(recent) < PERSISTENT:
            return
        for name, (low, high) in self.ranges.items():
            if all(share_of_range(row[name], low, high) > 1 - AT_BOUND for row in recent):
                self._warn(f"bound {name}", f"epoch {epoch}: {name} = {recent[-1][name]:.4g} is at the upper end of its range "
                           f"[{low:.4g}, {high:.4g}]; if the model is better for it, widen the range with high=")  # fmt: skip
            scale = f"scale:{name}"
            if all(scale in row and row[scale] < 1e-3 * max(rows[0][scale], 1e-3) for row in recent):
                self._warn(f"scale {name}", f"epoch {epoch}: σ of {name} has shrunk to {recent[-1][scale]:.2g}, too small to "
                           "learn a response from; raise entropy_weight, or keep σ with tune_scale=False")  # fmt: skip
        if all(row.get("response_norm", 0.0) > 1 for row in recent):
            self._warn("response", f"epoch {epoch}: a perturbation of λ is predicted to change the weights by "
                       f"{recent[-1]['response_norm']:.2g} times their size; lower response_optimizer's learning rate or the "
                       "scale of the hyperparameters, or set clip_norm")  # fmt: skip
        if all(
            "clean_train_loss" in row and row["clean_train_loss"] > max(1.1 * row["valid_loss"], 0.0) for row in recent
        ):
            train, valid = recent[-1]["clean_train_loss"], recent[-1]["valid_loss"]
            self._warn("limits", f"epoch {epoch}: training batches have a loss of {train:.4g}, validation {valid:.4g}: no "
                       "regularisation rises in a network that fits so badly, and little evidence lowers it; where "
                       "many of their labels are wrong, or validation data are of another kind, free λ by "
                       "fxstn.optim.SettlingAdam(params, limits=False)")  # fmt: skip
        errors = [row.get("linearization_error", 0.0) for row in recent]
        if min(errors) > 0.9 and errors[-1] >= errors[0]:
            self._warn("linearization", f"epoch {epoch}: the linearised loss says little of the true one (relative error "
                       f"{errors[-1]:.2f}); lower the scale of the hyperparameters (scale=), or response_optimizer's learning "
                       "rate")  # fmt: skip
