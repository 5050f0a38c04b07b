"""A refit: a network is trained anew at the values that a run has come to, on all data, at the cost of plain training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Unpack

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from fxstn.bilevel import distributed
from fxstn.bilevel.checkpoint_manager import RUN_FILE
from fxstn.bilevel.faults import warn_caller
from fxstn.bilevel.files import absolute, json_text, write_text
from fxstn.bilevel.history import History
from fxstn.bilevel.initial import OnLosses, Stretched, of_weights
from fxstn.bilevel.lock import FolderLock
from fxstn.bilevel.optimizers import OptimizerLike
from fxstn.bilevel.records import Scheduler
from fxstn.bilevel.run import Run
from fxstn.bilevel.run_settings import Settings, SettingsDict, text_of
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.settings import HyperSettings
from fxstn.bilevel.sources import checksum, checksum_of_data, length_of
from fxstn.bilevel.starts import StartWeights
from fxstn.bilevel.temporary import trained_apart, training_tensors
from fxstn.bilevel.tuner import Tuner
from fxstn.bilevel.updates import Updates
from fxstn.ir.input_errors import is_number
from fxstn.network import SelfTuningNetwork

RECIPE_FILE = "refit.json"
_NAMES = {
    "epochs": "length",
    "values": "values",
    "start": "weights to start from",
    "data": "data",
    "settings": "settings",
}
_NOT_PLAIN = ("optimizer", "schedulers", "step_schedulers", "schedule", "checkpoints", "callbacks", "progress")
AVERAGED = 0.05  # share of the steps of a refit that its averages of the weights reach back


def schedule_and_length(history: History, schedule: Schedule | None, epochs: int | None) -> tuple[Schedule, int]:
    """What a refit trains by: the values over its epochs, and the number of these.

    schedule, epochs: what the user wants; None: what the history says.

    Raises ValueError before the first epoch is done, and for epochs out of range; TypeError for what is no number.
    """
    if not isinstance(schedule, Schedule | None):
        kind = type(schedule).__name__
        raise TypeError(f"refit: schedule must be a fxstn.Schedule, such as Schedule.of(values), not of type {kind}")
    outcome = history.outcome()
    schedule = Schedule.of(outcome.values) if schedule is None else schedule
    epochs = (outcome.epoch or len(history)) if epochs is None else epochs
    if not is_number(epochs):
        raise TypeError(f"refit takes a number of epochs, or None for that of the best epoch; got epochs={epochs!r}")
    if not (epochs >= 1 and float(epochs).is_integer()):
        raise ValueError(f"refit: epochs={epochs} must be a whole number, 1 or more; None: that of the best epoch")
    return (schedule.for_epochs(int(epochs)) if schedule.epochs else schedule), int(epochs)


# The run that refits


def refit_settings(settings: Settings, history: History, steps: int, loader: object, epochs: int) -> dict[str, Any]:
    """The settings of a run which act on w₀, but its optimizer, as keywords for a `BilevelRunner`.

    steps: inner steps of the run in all its epochs.
    loader: of the refit.
    epochs: of the refit. Schedulers are stretched over these, so that the refit ends at the rates with which the run did.

    Nothing says which epoch of a refit is best, and the weights of one step are noisy. Where the run has no averages of the
    weights, the refit has them, over the last `AVERAGED` of its steps (Polyak & Juditsky 1992; docs/guides/values.md).
    """
    batches, of_run = length_of(loader), steps / len(history)
    per_epoch = math.ceil(batches / settings.accumulate) if batches else of_run
    length, averaged = len(history), AVERAGED * per_epoch * epochs
    losses = history["valid_loss"]

    def by_epoch(scheduler: Scheduler) -> Scheduler:
        if isinstance(scheduler, ReduceLROnPlateau):
            return OnLosses(scheduler, losses)
        return Stretched(scheduler, (length - 1) / max(1, epochs - 1))  # between the first epoch and the last

    def by_step(scheduler: Scheduler) -> Scheduler:
        return Stretched(scheduler, length * of_run / (epochs * per_epoch))

    names = ("execution", "clip_norm", "accumulate", "initial_state", "unpack", "progress")
    return {name: getattr(settings, name) for name in names} | {
        "ema": settings.ema or (1 - 1 / averaged if averaged > 1 else None),
        "schedulers": of_weights(settings.schedulers, by_epoch),
        "step_schedulers": of_weights(settings.step_schedulers, by_step),
        "hyper": HyperSettings(recalibrate=settings.hyper.recalibrate),
    }


def refit_folder(run: Path | None, own: str | Path | None) -> Path | None:
    """Where a refit has its files: out_dir/refit of its run, or a folder of its own; None: nowhere.

    run: out_dir of the run.
    own: what the user wants.
    """
    return run / "refit" if own is None and run is not None else absolute(own, "out_dir")


def prepare_folder(folder: Path, recipe: Mapping[str, object]) -> None:
    """Note in a folder what is refitted there. Where it was another refit, its files are removed, with a warning.

    recipe: what the refit follows. One that was interrupted goes on where its "epochs" and "values" are the same; one that is
        "done" has to be the same in everything.

    A folder that cannot be written is left to the run, which warns of it. Raises ValueError where the files are no refit's,
    OSError where it cannot be read what they are of.
    """
    before, lock = _recipe_in(folder / RECIPE_FILE), FolderLock(folder)
    try:
        keys = recipe.keys() if before and before.get("done") else ("epochs", "values")
        if before is not None and all(before.get(key) == recipe[key] for key in keys):
            return
        lock.acquire()
        files = [file for file in folder.iterdir() if RUN_FILE.fullmatch(file.name)] if folder.is_dir() else []
        if files and before is None:
            raise ValueError(
                f"refit: {folder} has the files of another run, {files[0].name} say; choose another out_dir"
            )
        for file in files:
            file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        note_recipe(folder, recipe)
    except OSError:
        return
    finally:
        lock.release()
    if files and before is not None:
        other = [_NAMES[key] for key in recipe if before.get(key) != recipe[key]]
        what = (
            f"had a refit with other {' and '.join(other)}"
            if before
            else f"had another refit, whose {RECIPE_FILE} is damaged"
        )
        warn_caller(f"{folder} {what}: the refit begins anew there")


def _recipe_in(path: Path) -> dict[str, Any] | None:
    """What a file says of a refit; None: there is none. Raises OSError where it cannot be read."""
    try:
        return as_recipe(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read ({error.strerror}), so that nobody knows which refit the files "
                      "beside it are of; mend the cause, or choose another out_dir") from error  # fmt: skip


def ingredients(run: RefitRun, loader: Iterable[object], keywords: Mapping[str, object]) -> dict[str, object]:
    """Checksums of what else a refit depends on.

    run: with the weights that it starts from.
    keywords: of the run.
    """
    texts = {name: text_of(value) for name, value in keywords.items() if name not in _NOT_PLAIN}
    return {
        "start": checksum(training_tensors(run.stn.model)),
        "data": checksum_of_data(loader) if isinstance(loader, DataLoader) else "",
        "settings": checksum([texts, run.updates.records["optimizer"].initial]),
    }


def note_recipe(folder: Path, recipe: Mapping[str, object]) -> None:
    """Write what is refitted in a folder, where that can be written."""
    with suppress(OSError):
        write_text(folder / RECIPE_FILE, json_text(recipe, indent=1) + "\n")


def as_recipe(text: str) -> dict[str, Any]:
    """What a file says of a refit; {} where it is damaged."""
    try:
        result = json.loads(text)
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}


def end_unevaluated_epoch(tuner: Tuner, losses: dict[str, float]) -> int:
    """As `Tuner.evaluated_epoch`, where there are no validation data. Returns the number of the epoch."""
    seconds = distributed.mean({"seconds": tuner.means.seconds()}, tuner.device)
    tuner.history.rows.append({"epoch": tuner.epoch, **losses, **tuner.problem.values(), **seconds})
    tuner.updates.end_epoch(math.nan)
    tuner.means.begin()
    return len(tuner.history)


class RefitRun(Protocol):
    """The run that a refit is: a `BilevelRunner`."""

    stn: SelfTuningNetwork
    updates: Updates
    out_dir: Path | None

    def fit(self, epochs: int) -> History: ...

    def best_model(self) -> nn.Module: ...


class Refittable(Run):
    """Base of the runs whose network can be trained anew at the values that they have come to.

    out_dir: of the run.
    refit_history: of the last refit, a row for each epoch.
    """

    out_dir: Path | None = None
    refit_history: History | None = None
    _tuner: Tuner
    _starts: StartWeights | None = None  # None: of a problem of the user's own

    def refit(
        self,
        train_loader: Iterable[object],
        *,
        epochs: int | None = None,
        fresh: nn.Module | Callable[[], nn.Module] | None = None,
        out_dir: str | Path | None = None,
        **settings: Unpack[SettingsDict],
    ) -> nn.Module:
        """Train the network anew, without tuning, at the values that the run has come to: on all data, validation data too.

        An epoch costs as much as one of plain training; nothing is evaluated. Optimizer, schedulers, clipping and the like are
        those of the run as it began. The model has averages of the last weights, where ema=None does not say otherwise. The run
        stays as it is; meanwhile its weights wait in main memory.

        train_loader: of all data.
        epochs: ≥ 1. None: the number of the best epoch; where none is better than the start, as many as the run had.
        fresh: a model of the same class with the weights to start from, or a function that makes one. None: the weights that
            the network had when the run was made. They wait in start.pt of its out_dir, or else in main memory.
        out_dir: where the refit has its files, from which it resumes. None: out_dir/refit of the run, if that has one.
        settings: keywords of `BilevelRunner`, in place of those of the run; schedule= has other values than
            `history.outcome()`, and is stretched over the whole length.

        Returns a plain model of the original class, in eval mode. `refit_history` has a row per epoch. Several processes: all
        must call it.
        Raises ValueError before the first epoch is done, and the errors of `fit`; TypeError for a problem of your own.
        """
        if self._starts is None:
            raise TypeError(
                "refit is for a network from fxstn.transform whose λ was tuned; train a problem of your own anew"
            )
        self.close_epoch()
        tuner = self._tuner
        schedule, epochs = schedule_and_length(self.history, settings.pop("schedule", None), epochs)
        folder = refit_folder(self.out_dir, out_dir)
        accumulate = settings.get("accumulate")
        own = tuner.settings if accumulate is None else replace(tuner.settings, accumulate=accumulate)
        keywords = refit_settings(own, self.history, self.steps, train_loader, epochs) | {"schedule": schedule}
        keywords |= {"optimizer": self._fresh_optimizer(), **self._own_settings(train_loader, accumulate, epochs)}
        keywords |= {"checkpoints": replace(tuner.settings.checkpoints, out_dir=folder), **settings}
        with tuner.evaluator.statistics.unaffected(), trained_apart(self.stn):
            self._starts.put(fresh)
            with self._refit_run(train_loader, keywords) as run:
                recipe = {"epochs": epochs, "values": schedule.values} | ingredients(run, train_loader, keywords)
                if run.out_dir is not None:  # once all settings are known to be right
                    distributed.in_first_process(partial(prepare_folder, run.out_dir, recipe))
                self.refit_history = run.fit(epochs)
                if run.out_dir is not None:
                    distributed.in_first_process(partial(note_recipe, run.out_dir, recipe | {"done": True}))
                return run.best_model()

    def _fresh_optimizer(self) -> OptimizerLike:
        """Of w₀, as before its first step."""
        raise NotImplementedError

    def _own_settings(self, train_loader: Iterable[object], accumulate: int | None, epochs: int) -> dict[str, Any]:
        """Further settings of w₀, where they are not all among those of the run.

        accumulate: what the user wants; None: as in the run.
        epochs: of the refit.
        """
        return {}

    def _refit_run(self, train_loader: Iterable[object], settings: dict[str, Any]) -> AbstractContextManager[RefitRun]:
        """A context with the run that trains the network by a schedule, without validation data."""
        raise NotImplementedError
