"""The keywords of a BilevelRunner: their defaults, what they mean, and as texts for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, Signature
from pathlib import PurePath
from typing import Any, SupportsFloat, TypedDict, TypeVar, cast

import torch

from fxstn.bilevel.arguments import check_places
from fxstn.bilevel.batches import Batch
from fxstn.bilevel.checks import check_settings, check_windows, plain_number
from fxstn.bilevel.history import Row
from fxstn.bilevel.losses import LossFunction
from fxstn.bilevel.optimizers import OptimizerLike
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.sequences import InitialState
from fxstn.bilevel.settings import (
    GROUPS,
    CheckpointSettings,
    ExecutionSettings,
    HyperSettings,
    ResponseSettings,
    SettingsGroup,
    check_keywords,
)
from fxstn.bilevel.totals import Metrics
from fxstn.bilevel.updates import SchedulerFactories

Columns = dict[str, Callable[[Row], SupportsFloat]]
Callback = Callable[..., object]  # gets the runner
Class = TypeVar("Class", bound=type)
FORM, PROBLEM_FORM = ("stn", "loss_fn", "train_loader", "valid_loader"), ("problem", "train_loader", "valid_loader")
# Settings that may differ between the processes of a run.
OF_PROCESS = ("execution.device", "checkpoints.out_dir", "progress")
# Plain settings that change neither training nor the choice of the best model.
AROUND = ("checkpoints.save_minutes", "checkpoints.keep", "checkpoints.rollbacks", "execution.compile")
OF_NETWORKS = (
    "valid_loss_fn",
    "initial_state",
    "schedule",
    "execution.compile",
    "response.perturb",
    "hyper.tune_scale",
)
RATE_OF_HYPER = (
    "λ's optimizer has it: hyper=fxstn.HyperSettings(optimizer=lambda p: fxstn.optim.SettlingAdam(p, lr=...))"
)
RATE_OF_RESPONSE = (
    "Θ's optimizer has it: response=fxstn.ResponseSettings(optimizer=lambda p: torch.optim.Adam(p, lr=...))"
)
_RATES = "learning rates belong to the optimizers: optimizer=lambda p: torch.optim.SGD(p, lr=0.1)"
ELSEWHERE = {  # what other libraries take where the runner does not
    "lr": _RATES,
    "learning_rate": _RATES,
    "hyper_lr": RATE_OF_HYPER,
    "response_lr": RATE_OF_RESPONSE,
    "epochs": "the number of epochs belongs to fit(epochs)",
    "batch_size": "the batch size belongs to the DataLoader",
    "patience": "it is a callback: callbacks=[fxstn.EarlyStopping(patience=...)]",
    "loss_fn": "a BilevelProblem has its losses itself",
    "seed": "call torch.manual_seed(seed) before fxstn.transform and BilevelRunner",
    "valid": "validation data are valid_loader",
    "train": "training data are train_loader",
}


class SettingsDict(TypedDict, total=False):
    """The settings as keywords of `BilevelRunner`, for type checkers: names and types of `Settings`."""

    optimizer: OptimizerLike
    response: ResponseSettings
    hyper: HyperSettings
    checkpoints: CheckpointSettings
    execution: ExecutionSettings
    schedulers: SchedulerFactories
    step_schedulers: SchedulerFactories
    clip_norm: float | None
    accumulate: int
    schedule: Schedule | None
    valid_loss_fn: LossFunction | None
    initial_state: InitialState | None
    unpack: Callable[[Any], Batch] | None
    ema: float | None
    metrics: Metrics | None
    columns: Columns | None
    callbacks: Sequence[Callback]
    progress: bool | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: the keywords of `BilevelRunner`.

    The method. `fxstn.PAPER` has the paper's settings in place of the first two groups: BilevelRunner(…, **fxstn.PAPER):
    response: how the response Θ is learned. Default: `fxstn.ResponseSettings()`.
    hyper: how λ and σ are tuned, and when. Default: `fxstn.HyperSettings()`.
    checkpoints: folder, frequency and number of files, and recovery. Default: `fxstn.CheckpointSettings()`.
    execution: device, compilation, precision. Default: `fxstn.ExecutionSettings()`.

    Training:
    optimizer: of w₀: a factory, an optimizer that holds exactly its parameters, or a list of optimizers that do together.
        Default: SGD, momentum 0.9, lr 1e-2.
    schedulers: {"optimizer", "response.optimizer", "hyper.optimizer" or "hyper.scale_optimizer": factory}, such as
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30). They step after each epoch, ReduceLROnPlateau with the
        validation loss. Default: None, no schedulers.
    step_schedulers: as schedulers, but each steps with its optimizer. Default: None.
    clip_norm: largest norm of a step's gradient of w₀, and of Θ. Default: None, no bound.
    accumulate: ≥ 1, number of batches that one inner step counts as one. Default: 1.
    schedule: λ by epoch, from `History.schedule()` or a file. The run then trains w₀ on it and takes no step of Θ, λ or σ.
        Default: None, λ is tuned.

    Losses and batches:
    valid_loss_fn: loss of the hyper step and of evaluation. Default: None, loss_fn.
    initial_state: function batch size → the first state, for a network that carries a state from one window of its sequences to
        the next, forward(*inputs, *state) → (output, state) (`fxstn.CarriedState`). train_loader then yields windows in order,
        all with as many examples; each epoch begins with the first state. The loss functions and metrics get the output alone.
        Default: None, no state.
    unpack: function batch → (inputs, target), for loaders that yield something else. Default: None, batches are such pairs.

    Evaluation:
    ema: decay in (0, 1) of averages of the network, which evaluation, best.pt and best_model then use. Default: None, no
        averages.
    metrics: {name: f(output, target) → number, the mean over the batch, or (sum, count)}. The mean over the validation set
        weights batches as that of the loss does, without weights of classes; NaN where nothing counts. Default: None.
    columns: {name: f(row) → number}, more columns of the history, computed from its row. The progress bar shows them.
        Default: None.
    callbacks: functions of the runner, called after each epoch, such as `fxstn.EarlyStopping(patience)` and
        `fxstn.TensorBoard(folder)`. `runner.stop()` ends the run there. A callback with a method on_fit_start(runner) has it
        called when `fit` begins. Default: ().
    progress: whether to show a progress bar. Default: None, on a terminal only.

    Raises ValueError that lists every number out of range, and TypeError for a value of another kind.
    """

    optimizer: OptimizerLike = None
    response: ResponseSettings = ResponseSettings()  # noqa: RUF009 (frozen)
    hyper: HyperSettings = HyperSettings()  # noqa: RUF009
    checkpoints: CheckpointSettings = CheckpointSettings()  # noqa: RUF009
    execution: ExecutionSettings = ExecutionSettings()  # noqa: RUF009
    schedulers: SchedulerFactories = None
    step_schedulers: SchedulerFactories = None
    clip_norm: float | None = None
    accumulate: int = 1
    schedule: Schedule | None = None
    valid_loss_fn: LossFunction | None = None
    initial_state: InitialState | None = None
    unpack: Callable[[Any], Batch] | None = None
    ema: float | None = None
    metrics: Metrics | None = None
    columns: Columns | None = None
    callbacks: Sequence[Callback] = ()
    progress: bool | None = None

    def __post_init__(self) -> None:
        for group in GROUPS:
            value = getattr(self, group.keyword)
            if not isinstance(value, group):
                raise TypeError(f"{group.keyword}={value!r} must be a fxstn.{group.__name__}")
        check_settings(self.by_path())
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_number(name, value))
        check_windows(self.initial_state, self.response.windows, self.accumulate)

    def by_path(self) -> dict[str, object]:
        """{"optimizer": …, "response.every": 4, …}"""
        result: dict[str, object] = {}
        for name, value in vars(self).items():
            result |= value.by_path() if isinstance(value, SettingsGroup) else {name: value}
        return result

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of some settings that are not at their defaults."""
        own, defaults = self.by_path(), Settings().by_path()
        return [name for name in names if own[name] != defaults[name]]

    def shared(self) -> dict[str, object]:
        """The settings that are plain values: what all processes of a run must have in common."""
        plain = (bool, int, float, str, torch.dtype, torch.memory_format, type(None))
        return {
            name: value for name, value in self.by_path().items() if isinstance(value, plain) and name not in OF_PROCESS
        }

    def acting(self, loss_fn: str) -> dict[str, object]:
        """The plain values that training and its result depend on, and the names of the losses.

        loss_fn: the name of the training loss.
        """
        own = self.by_path()
        numbers = [name for name, value in Settings().by_path().items() if isinstance(value, (bool, int, float, str))]
        names = ["clip_norm", "ema", "execution.autocast", *(name for name in numbers if name not in AROUND)]
        losses = {"loss_fn": loss_fn, "valid_loss_fn": text_of(self.valid_loss_fn)}
        return {name: own[name] for name in names} | losses

    def texts(self) -> dict[str, str]:
        """The settings for a reader: numbers as they are, functions and objects by name."""
        dicts = {"metrics": self.metrics or {}, "columns": self.columns or {}}
        return {name: text_of(value) for name, value in (self.by_path() | dicts).items()}


def settings_of(keywords: Mapping[str, Any]) -> Settings:
    """The settings that are given as keywords. Raises TypeError for a name that is none, and the errors of `Settings`."""
    check_keywords("BilevelRunner", keywords, [field.name for field in fields(Settings)], ELSEWHERE)
    return Settings(**keywords)


def positional(arguments: Sequence[object], keywords: dict[str, Any]) -> list[Any]:
    """The network or the problem, the loss function, None for a problem, and the loaders. Takes their names out of keywords.

    arguments, keywords: of `BilevelRunner`.

    Raises TypeError where they are not those of one of its two forms, or in each other's places.
    """
    first = arguments[0] if arguments else keywords.get("problem", keywords.get("stn"))
    form = PROBLEM_FORM if isinstance(first, BilevelProblem) else FORM
    named = {name: keywords.pop(name) for name in form if name in keywords}
    try:
        values = list(_signature(form).bind(*arguments, **named).args)
    except TypeError as error:
        raise TypeError(
            f"BilevelRunner takes ({', '.join(FORM)}, ...), or ({', '.join(PROBLEM_FORM)}, ...) where the first is a "
            f"BilevelProblem, which has its losses itself: {error}"
        ) from None
    check_places("BilevelRunner", dict(list(zip(form, values, strict=True))[1:]), form)
    return values if form is FORM else [values[0], None, *values[1:]]


def _signature(names: Sequence[str], keywords: Sequence[Parameter] = ()) -> Signature:
    return Signature([*(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names), *keywords])


def with_settings_listed(runner: Class) -> Class:
    """Decorator: `help` of the class lists every setting with its default and explains it."""
    keywords = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
    ]
    cast(Any, runner).__signature__ = _signature(FORM, keywords)
    explanation = (Settings.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0]  # without the title and "Raises"
    runner.__doc__ = f"{runner.__doc__}\n{explanation}\n"
    return runner


def text_of(value: object) -> str:
    """A value for a reader, in a line."""
    if isinstance(value, partial):
        arguments = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        return f"{text_of(value.func)}({', '.join(arguments)})"
    if isinstance(value, Mapping):
        entries = (str(key) if callable(entry) else f"{key}: {text_of(entry)}" for key, entry in value.items())
        return ", ".join(entries) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value)) or "none"
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    if value is None or isinstance(value, (int, float, str, torch.dtype, torch.memory_format, torch.device, PurePath)):
        return str(value)
    return getattr(value, "__name__", None) or type(value).__name__
