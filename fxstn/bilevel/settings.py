"""The settings of a BilevelRunner: their defaults, what they mean, and as texts for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from pathlib import Path, PurePath
from typing import Any, SupportsFloat, TypedDict, TypeVar

import torch

from fxstn.bilevel.batches import Batch
from fxstn.bilevel.checks import WHOLE, check_settings
from fxstn.bilevel.history import Row, Schedule
from fxstn.bilevel.losses import LossFunction, PerturbMode
from fxstn.bilevel.sequences import InitialState
from fxstn.bilevel.totals import Metrics
from fxstn.bilevel.updates import OptimizerLike, SchedulerFactories, rmsprop
from fxstn.ir.input_errors import is_number

Columns = dict[str, Callable[[Row], SupportsFloat]]
Callback = Callable[..., object]  # gets the runner
Function = TypeVar("Function", bound=Callable[..., object])
OF_PROCESS = ("device", "out_dir", "progress")  # settings that may differ between the processes of a run
_RATES = "learning rates belong to the optimizers: optimizer=lambda p: torch.optim.SGD(p, lr=0.1)"
# Plain settings that change neither training nor the choice of the best model.
AROUND = ("save_minutes", "keep", "rollbacks", "compile")
ELSEWHERE = {  # what other libraries take where the runner does not
    "lr": _RATES,
    "learning_rate": _RATES,
    "epochs": "the number of epochs belongs to fit(epochs)",
    "batch_size": "the batch size belongs to the DataLoader",
}
OF_NETWORKS = ("valid_loss_fn", "initial_state", "schedule", "compile", "perturb", "tune_scale")


class SettingsDict(TypedDict, total=False):
    """The settings as keywords of `BilevelRunner`, for type checkers: names and types of `Settings`."""

    optimizer: OptimizerLike
    response_optimizer: OptimizerLike
    hyper_optimizer: OptimizerLike
    scale_optimizer: OptimizerLike
    schedulers: SchedulerFactories
    step_schedulers: SchedulerFactories
    clip_norm: float | None
    train_steps: int
    valid_steps: int
    warmup_epochs: int
    accumulate: int
    response_every: int
    response_fraction: float
    response_widening: float
    response_windows: int
    hyper_fraction: float
    inner_correction: float
    entropy_weight: float
    tune_scale: bool
    perturb: PerturbMode
    schedule: Schedule | None
    valid_loss_fn: LossFunction | None
    initial_state: InitialState | None
    unpack: Callable[[Any], Batch] | None
    ema: float | None
    recalibrate: int
    metrics: Metrics | None
    columns: Columns | None
    callbacks: Sequence[Callback]
    patience: int | None
    out_dir: str | Path | None
    save_minutes: float
    keep: int
    rollbacks: int
    progress: bool | None
    device: torch.device | str | None
    compile: bool | dict[str, Any]
    autocast: torch.dtype | None
    memory_format: torch.memory_format | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: the keywords of `BilevelRunner`.

    Optimizers. Each is a factory, an optimizer that holds exactly its parameters, or a list of optimizers that do together:
    optimizer: of w₀. Default: SGD, momentum 0.9, lr 1e-2.
    response_optimizer: of Θ. Default: Adam, lr 1e-2; for a structured response that of w₀.
    hyper_optimizer: of λ. Default: `fxstn.optim.SettlingAdam`. Its rate falls from 0.4, and it shrinks λ's step when the
        gradient is noisy.
    scale_optimizer: of σ, which is learned where tune_scale is True. Default: RMSprop, lr 1e-2.
    schedulers: {name of an optimizer argument: factory}, such as
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30). They step after each epoch, ReduceLROnPlateau with the
        validation loss. Default: None, no schedulers.
    step_schedulers: as schedulers, but each steps with its optimizer. Default: None.
    clip_norm: largest norm of a step's gradient of w₀, and of Θ. Default: None, no bound.

    Steps:
    train_steps: T_train ≥ 1, number of inner steps of a cycle. Default: 5.
    valid_steps: T_valid ≥ 1, number of hyper steps at the end of a cycle. Default: 1.
    warmup_epochs: ≥ 0, number of epochs at the start without hyper steps. Default: 0.
    accumulate: ≥ 1, number of batches that one inner step counts as one. Default: 1.
    response_every: ≥ 1, number of inner steps from one response step to the next. Each step is unbiased; with a larger number
        Θ moves less often. Default: 4.
    response_fraction: in (0, 1], part of each batch that the response step sees. Its gradient is unbiased, except for the
        statistics of batch norms. Default: 1.0.
    response_widening: ≥ 1. Near the ends of a range ε is enlarged in the response step, at most by this factor. Default: 2.0.
    response_windows: ≥ 1, number of windows in a row that share one ε. More than 1 lets the tangent reach back over them: the
        perturbed network goes on with its own state. 1 begins each window with the state of the inner step and a tangent of
        zero. Default: 1.
    hyper_fraction: in (0, 1], part of each validation batch that the hyper step sees. Default: 1.0.
    inner_correction: c ≥ 0, how much of the training gradient is subtracted from λ's gradient. 1 removes what training would do
        anyway; 0 is the paper. The hypergradient is Θᵀ(∇L_V − c ∇L_T), with ∇L_T the mean over the inner steps since the last
        hyper step. Where the weights are at their best ∇L_T is zero and c has no effect. To first order ∇L_V − ∇L_T is ∇L_V
        after a Newton step of the training loss, if both losses have about the same curvature. Method "stn" does not use it.
        Default: 1.0.
    entropy_weight: τ ≥ 0, weight of the entropy of ε. A larger weight keeps σ larger, where tune_scale is True.
        Default: 0.001.
    tune_scale: True learns σ, in a hyper step that draws ε (Eq. 2.7). False keeps σ, and the hyper step takes the gradient at λ
        itself. Default: False.
    perturb: "example" draws one ε per example (the paper), "batch" one for all examples. "auto" draws one per example where the
        network allows it. Default: "auto".
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
    recalibrate: ≥ 0, number of training batches, those of the last steps, on which evaluation, best.pt and best_model estimate
        the statistics of batch norms anew, in eval mode. Their loss in eval mode also says how far the network overfits, which
        limits the steps of λ (`fxstn.optim.set_gap`). 0: the statistics that training keeps, and no limits. Default: 10.
    metrics: {name: f(output, target) → number, the mean over the batch, or (sum, count)}. The mean over the validation set
        weights batches as that of the loss does, without weights of classes; NaN where nothing counts. Default: None.
    columns: {name: f(row) → number}, more columns of the history, computed from its row. The progress bar shows them.
        Default: None.
    callbacks: functions of the runner, called after each epoch, such as `fxstn.TensorBoard(folder)`. `runner.stop()` ends the
        run there. Default: ().
    patience: number of epochs without a better validation loss after which the run stops. Default: None, it does not.

    Files and faults:
    out_dir: folder of history.csv, last.pt and best.pt. A run that finds its last.pt there resumes, and ends as if it had never
        stopped. A folder that cannot be written to gives a warning; training goes on. Default: None, no files.
    save_minutes: > 0, minutes between checkpoints within an epoch. A checkpoint is also written at SIGTERM and Ctrl-C.
        Default: 30.0.
    keep: ≥ 1, number of checkpoints in out_dir: last.pt, last.1.pt, … Default: 2.
    rollbacks: ≥ 0, how often a run may go back. When a loss becomes NaN, infinite or 10⁴ times what it was, the run goes back
        to its last checkpoint, halves the learning rate of that loss's parameters and goes on, checking every batch. Without
        out_dir this needs a copy of the run in main memory; 0 makes none. Default: 2.
    progress: whether to show a progress bar. Default: None, on a terminal only.

    Device:
    device: of the run. Default: None, that of the network.
    compile: True runs the graphs through torch.compile; a dict gives its options. Default: False.
    autocast: dtype of the losses' forward, such as torch.bfloat16; parameters keep theirs. torch.float16 scales the losses,
        and a step whose gradient overflows counts for nothing. Default: None, no autocast.
    memory_format: of weights and 4-d (5-d) inputs, such as torch.channels_last. Default: None, as they are.

    Raises ValueError that lists every number out of range, and TypeError for a value of another kind.
    """

    optimizer: OptimizerLike = None
    response_optimizer: OptimizerLike = None
    hyper_optimizer: OptimizerLike = None
    scale_optimizer: OptimizerLike = None
    schedulers: SchedulerFactories = None
    step_schedulers: SchedulerFactories = None
    clip_norm: float | None = None
    train_steps: int = 5
    valid_steps: int = 1
    warmup_epochs: int = 0
    accumulate: int = 1
    response_every: int = 4
    response_fraction: float = 1.0
    response_widening: float = 2.0
    response_windows: int = 1
    hyper_fraction: float = 1.0
    inner_correction: float = 1.0
    entropy_weight: float = 1e-3
    tune_scale: bool = False
    perturb: PerturbMode = "auto"
    schedule: Schedule | None = None
    valid_loss_fn: LossFunction | None = None
    initial_state: InitialState | None = None
    unpack: Callable[[Any], Batch] | None = None
    ema: float | None = None
    recalibrate: int = 10
    metrics: Metrics | None = None
    columns: Columns | None = None
    callbacks: Sequence[Callback] = ()
    patience: int | None = None
    out_dir: str | Path | None = None
    save_minutes: float = 30.0
    keep: int = 2
    rollbacks: int = 2
    progress: bool | None = None
    device: torch.device | str | None = None
    compile: bool | dict[str, Any] = False
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None

    def __post_init__(self) -> None:
        check_settings(vars(self))
        for name, value in vars(self).items():
            if is_number(value):  # NumPy's too, and 3.0 where a whole number is meant
                object.__setattr__(self, name, int(value) if name in WHOLE else float(value))

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of some settings that are not at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def shared(self) -> dict[str, object]:
        """The settings that are plain values: what all processes of a run must have in common."""
        plain = (bool, int, float, str, torch.dtype, torch.memory_format, type(None))
        return {
            name: value for name, value in vars(self).items() if isinstance(value, plain) and name not in OF_PROCESS
        }

    def acting(self, loss_fn: str) -> dict[str, object]:
        """The plain values that training and its result depend on, and the name of the validation loss.

        loss_fn: the name of the training loss.
        """
        numbers = [field.name for field in fields(self) if isinstance(field.default, (bool, int, float, str))]
        names = ["clip_norm", "ema", "autocast", *(name for name in numbers if name not in AROUND)]
        loss = loss_fn if self.valid_loss_fn is None else text_of(self.valid_loss_fn)
        return {name: getattr(self, name) for name in names} | {"valid_loss_fn": loss}

    def texts(self) -> dict[str, str]:
        """The settings for a reader: numbers as they are, functions and objects by name."""
        dicts = {"metrics": self.metrics or {}, "columns": self.columns or {}}
        return {name: text_of(value) for name, value in (vars(self) | dicts).items()}


def with_settings_listed(function: Function) -> Function:
    """Decorator: in place of **settings, the function's signature lists every setting with its default, for `help`."""
    own = signature(function)
    positional = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    settings = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
    ]
    vars(function)["__signature__"] = own.replace(parameters=[*positional, *settings])
    return function


def settings_of(keywords: SettingsDict) -> Settings:
    """The settings that are given as keywords. Raises TypeError for a name that is none, and the errors of `Settings`."""
    names = [field.name for field in fields(Settings)]
    if unknown := [name for name in keywords if name not in names]:
        close = get_close_matches(unknown[0], names, 1)
        otherwise = f"did you mean {close[0]!r}?" if close else "help(fxstn.BilevelRunner) lists them"
        raise TypeError(f"BilevelRunner has no argument {unknown[0]!r}; {ELSEWHERE.get(unknown[0], otherwise)}")
    return Settings(**keywords)


PAPER: dict[str, Any] = {
    "response_every": 1, "response_fraction": 1.0, "response_widening": 1.0, "tune_scale": True, "hyper_optimizer": rmsprop,
    "inner_correction": 0.0,
}  # fmt: skip


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
    if value is None or isinstance(value, (int, float, str, torch.dtype, torch.memory_format, torch.device, PurePath)):
        return str(value)
    return getattr(value, "__name__", None) or type(value).__name__
