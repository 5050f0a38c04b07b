"""What goes wrong in a run: losses that are no numbers, signs of trouble in the history."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.counts import Mean, positive, without_empty
from fxstn.bilevel.history import SCALE, Row
from fxstn.bilevel.outcome import end_signs
from fxstn.bilevel.state import State
from fxstn.bilevel.updates import Updates
from fxstn.ir.errors import ExplainedError

UNCHECKED = 100  # inner steps for which the losses stay on a device that the host would have to wait for
EXPLODED = 1e4  # factor over the first loss, or over 1: training cannot bring such a loss down
AT_BOUND = 0.01  # share of the range from its end, within which a value is at the end
Ranges = dict[str, tuple[float, float]]  # {name: (low, high)}
FEW = 3  # hyperparameters that a warning names
_UNWANTED = ", or leave out this regularisation, which the run does not want"
_ENDS = "{{}} hyperparameters are at the {} end of their ranges: {{}}; if the model is better for it, widen the ranges with {}="
_SEVERAL = {  # {kind of a sign: what it says of so many hyperparameters, with these names}
    "upper": _ENDS.format("upper", "high"),
    "lower": _ENDS.format("lower", "low"),
    "weak": _ENDS.format("lower", "low") + _UNWANTED,
    "scale": "σ of {} hyperparameters has shrunk too far to learn a response from: {}; raise hyper.entropy_weight, or keep "
    "σ with hyper.tune_scale=False",
}
PERSISTENT = 3  # epochs in a row that a sign must last
OPTIMIZERS_TO_SLOW = {  # {loss: optimizers whose rates a bad value of it calls too high}
    "train_loss": ("optimizer",),
    "valid_loss": ("optimizer",),
    "response_loss": ("response.optimizer",),
    "hyper_loss": ("response.optimizer", "hyper.optimizer"),
}


class DivergedError(ExplainedError, RuntimeError):
    """A loss became NaN, infinite or huge, and again after the run went back. The best model so far is kept."""

    page = "guides/runs.md#a-loss-that-is-no-number"


class RunWarning(UserWarning):
    """A sign that a run goes wrong, with the remedy."""


def warn_caller(text: str, category: type[Warning] = RunWarning) -> None:
    """Warn at the line of the user's code that called fxstn."""
    level, frame = 1, sys._getframe()
    passed = ("fxstn", "contextlib", "torch")  # torch: the hooks of an optimizer
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in passed:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


class BadLoss(Exception):
    """A loss is no number, or huge. The runner catches it: the run goes back, or raises DivergedError.

    name: of the loss.
    fault: what happened to it.
    time: epoch and step.
    """

    def __init__(self, name: str, fault: str, time: str) -> None:
        super().__init__(f"{name} {fault} in {time}")
        self.name = name


def slow_after(fault: BadLoss, updates: Updates, factor: float) -> list[tuple[str, float]]:
    """Multiply the rates that a bad loss calls too high; (optimizer, new rate) of each."""
    slowed = [name for name in OPTIMIZERS_TO_SLOW[fault.name] if name in updates.optimizers]
    return [(name, updates.slow(name, factor)) for name in slowed]


class LossGuard:
    """Raises BadLoss for a loss that is not finite, or `EXPLODED` times its first value.

    device: of the losses. For another one than the CPU the host would have to wait, so it checks now and then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: dict[str, float] = {}  # the first value of each loss
        self._step = 0  # after which losses were checked last
        self._notes: list[tuple[str, Mean, str]] = []  # (loss, its value, time), not checked yet

    def note(self, name: str, loss: Mean, time: str) -> Tensor:
        """Note a loss for the next check; returns whether it is a bad one, as far as is known, on the device.

        Several processes: all must call it, and note their mean.
        """
        if distributed.processes() > 1:  # the mean of all: in one process a batch may be padding alone
            whole = torch.as_tensor(loss.count, dtype=loss.value.dtype, device=loss.value.device)
            sums = torch.stack((without_empty(loss.value, whole) * whole, whole))
            distributed.average([sums])
            loss = Mean(sums[0] / positive(sums[1]), sums[1])
        self._notes.append((name, loss, time))
        most = EXPLODED * max(1.0, abs(self.first[name])) if name in self.first else math.inf
        return (loss.value.abs() < most).logical_not_()

    def note_first(self, name: str, loss: Mean, time: str) -> None:
        """As `note`, for the first value of a loss."""
        if name not in self.first and all(name != other for other, _, _ in self._notes):
            self.note(name, loss, time)

    def check_now_and_then(self, step: int, losses: Callable[[], dict[str, float]], time: str) -> None:
        """Check losses that a function returns, unless the host must not wait yet.

        step: inner steps of the run so far.
        """
        if self.device.type == "cpu" or step - self._step >= UNCHECKED:
            self._step = step
            self.check(losses(), time)

    def check(self, losses: dict[str, float], time: str) -> None:
        """Check the losses noted, and others."""
        notes, self._notes = self._notes, []
        for name, loss, when in notes:
            self._check_one(name, float(without_empty(loss.value, loss.count)), when)
        for name, value in losses.items():
            self._check_one(name, value, time)

    def _check_one(self, name: str, loss: float, time: str) -> None:
        if not math.isfinite(loss) or abs(loss) > EXPLODED * max(1.0, abs(self.first.setdefault(name, loss))):
            raise BadLoss(name, f"became {loss:.6g}", time)

    def state_dict(self) -> State:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: State) -> None:
        self.first, self._notes, self._step = dict(state["first"]), [], 0


def share_of_range(value: float, low: float, high: float) -> float:
    """The share of a range below a value; in log space where the range spans a factor of 100."""
    if low > 0 and high >= 100 * low:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _bounds_reached(recent: Sequence[Row], ranges: Ranges, regularizing: Collection[str]) -> Iterator[tuple[str, str]]:
    for name, (low, high) in ranges.items():
        shares = [share_of_range(row[name], low, high) for row in recent]
        place = f"{name} = {recent[-1][name]:.4g} is at the {{}} end of its range [{low:.4g}, {high:.4g}]; "
        if min(shares) > 1 - AT_BOUND:
            yield f"upper {name}", place.format("upper") + "if the model is better for it, widen the range with high="
        # A regulariser that is 0 is off: that is a result, and no lower end could be given.
        elif max(shares) < AT_BOUND and not (low == 0 and name in regularizing):
            kind, rest = ("weak", _UNWANTED) if name in regularizing else ("lower", "")
            yield (
                f"{kind} {name}",
                place.format("lower") + f"if the model is better for it, widen the range with low={rest}",
            )


def _scales_lost(recent: Sequence[Row], first: Row, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        column = SCALE + name
        if all(column in row and row[column] < 1e-3 * max(first[column], 1e-3) for row in recent):
            yield f"scale {name}", (f"σ of {name} has shrunk to {recent[-1][column]:.2g}, too small to learn a response from; "
                                    "raise hyper.entropy_weight, or keep σ with hyper.tune_scale=False")  # fmt: skip


def _last_with(rows: Sequence[Row], column: str) -> Sequence[Row]:
    """The last `PERSISTENT` rows that have a column, which not every epoch measures; () where there are fewer."""
    measured = [row for row in rows if column in row][-PERSISTENT:]
    return measured if len(measured) == PERSISTENT else ()


def _response_too_large(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    recent = _last_with(rows, "response_norm")
    if recent and all(row["response_norm"] > 1 for row in recent):
        yield "response", ("a perturbation of λ is predicted to change the weights by "
                           f"{recent[-1]['response_norm']:.2g} times their size; lower response.optimizer's learning rate or "
                           "the scale of the hyperparameters, or set clip_norm")  # fmt: skip


def _underfitting(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    recent = _last_with(rows, "clean_train_loss")
    if recent and all(row["clean_train_loss"] > max(1.1 * row["valid_loss"], 0.0) for row in recent):
        train, valid = recent[-1]["clean_train_loss"], recent[-1]["valid_loss"]
        yield "limits", (f"training batches have a loss of {train:.4g}, validation {valid:.4g}: no regularisation rises in a "
                         "network that fits so badly, and little evidence lowers it; where many of their labels are wrong, or "
                         "validation data are of another kind, free λ by hyper=fxstn.HyperSettings(optimizer=lambda p: "
                         "fxstn.optim.SettlingAdam(p, limits=False))")  # fmt: skip


def _linearization_poor(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    errors = [row["linearization_error"] for row in _last_with(rows, "linearization_error")]
    if errors and min(errors) > 0.9 and errors[-1] >= errors[0]:
        yield "linearization", (f"the linearised loss says little of the true one (relative error {errors[-1]:.2f}); lower the "
                                "scale of the hyperparameters (scale=), or response.optimizer's learning rate")  # fmt: skip


def signs(rows: Sequence[Row], ranges: Ranges, regularizing: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(sign, text) of every trouble that has lasted for `PERSISTENT` epochs. A sign of a hyperparameter is "KIND NAME".

    rows: of the history, one at least.
    ranges: {name: (low, high)} of hyperparameters, finite.
    regularizing: names of those of which a higher value is a stronger regularisation.
    """
    recent = rows[-PERSISTENT:]
    if len(recent) == PERSISTENT:
        yield from _bounds_reached(recent, ranges, regularizing)
        yield from _scales_lost(recent, rows[0], list(ranges))
    yield from _response_too_large(rows)
    yield from _underfitting(rows)
    yield from _linearization_poor(rows)


def _text_of_several(kind: str, group: Sequence[str]) -> str:
    """What a group of signs says that are of one kind."""
    names = [sign.partition(" ")[2] for sign in group]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return _SEVERAL[kind].format(len(names), ", ".join(names[:FEW]) + more)


class Monitors:
    """Reads each epoch's row, and warns of every sign of trouble once in a run, of those of one kind together.

    ranges: {name: (low, high)} of the hyperparameters.
    regularizing: as of `signs`.

    `warnings` has (epoch, text) of every warning of the run, for reports.
    """

    def __init__(self, ranges: Ranges, regularizing: Collection[str] = ()) -> None:
        self.regularizing = regularizing
        self.ranges = {name: (low, high) for name, (low, high) in ranges.items() if math.isfinite(high - low)}
        self.warnings: list[tuple[int, str]] = []
        self._signs: set[str] = set()  # signs that a warning was already given of

    def note(self, texts: Iterable[str]) -> None:
        """Warn of what shows before training, epoch 0."""
        for text in texts:
            self.warnings.append((0, text))
            warn_caller(text)

    def read(self, rows: Sequence[Row]) -> None:
        """Warn of new signs in the rows up to this epoch."""
        self._warn_of(signs(rows, self.ranges, self.regularizing), rows)

    def read_end(self, rows: Sequence[Row], start_loss: float | None) -> None:
        """Warn of what the whole run shows, after its last epoch."""
        self._warn_of(end_signs(rows, start_loss), rows)

    def _warn_of(self, new: Iterable[tuple[str, str]], rows: Sequence[Row]) -> None:
        epoch, texts = int(rows[-1]["epoch"]), {sign: text for sign, text in new if sign not in self._signs}
        alike: dict[str, list[str]] = {}
        for sign in texts:
            alike.setdefault(sign.partition(" ")[0], []).append(sign)
        for kind, group in alike.items():
            text = texts[group[0]] if len(group) == 1 else _text_of_several(kind, group)
            self._signs.update(group)
            self.warnings.append((epoch, text := f"epoch {epoch}: {text}"))
            warn_caller(text)

    def state_dict(self) -> State:
        return {"signs": sorted(self._signs), "warnings": list(self.warnings)}

    def load_state_dict(self, state: State) -> None:
        self._signs = set(state["signs"])
        self.warnings = [(epoch, text) for epoch, text in state["warnings"]]
