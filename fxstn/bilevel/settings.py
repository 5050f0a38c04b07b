"""Settings in groups, for whatever trains with a response, and a preset of them. They know of no loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypedDict, TypeVar

import torch

from fxstn.bilevel.checks import check_settings, plain_number
from fxstn.bilevel.optimizers import OptimizerLike, rmsprop
from fxstn.bilevel.perturbation import PerturbMode
from fxstn.ir.cost import CYCLE, LONGEST_CYCLE, RESPONSE_EVERY


class SettingsGroup:
    """A group of settings that is checked when it is made.

    keyword: of the argument that takes the group. Errors and reports name a setting by it: "response.every".
    """

    keyword: ClassVar[str]

    def __post_init__(self) -> None:
        check_settings(self.by_path())
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_number(f"{self.keyword}.{name}", value))

    def __repr__(self) -> str:
        """The constructor's call, of what is not at its default."""
        changed = [f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(type(self), name)]
        return f"{type(self).__name__}({', '.join(changed)})"

    def by_path(self) -> dict[str, object]:
        """{"response.every": 4, …}"""
        return {f"{self.keyword}.{name}": value for name, value in vars(self).items()}


Group = TypeVar("Group", bound=SettingsGroup)


def explains_unknown(group: type[Group]) -> type[Group]:
    """Decorator of a group: a keyword that it does not have raises a TypeError that says what was meant."""
    make = group.__init__
    names = [field.name for field in fields(group)]  # type: ignore[arg-type]

    @wraps(make)
    def checked(self: Group, *arguments: object, **keywords: object) -> None:
        check_keywords(group.__name__, keywords, names)
        make(self, *arguments, **keywords)

    group.__init__ = checked  # type: ignore[assignment, method-assign]
    return group


@explains_unknown
@dataclass(frozen=True, kw_only=True, repr=False)
class ResponseSettings(SettingsGroup):
    """How the response Θ is learned.

    optimizer: of Θ: a factory, an optimizer that holds exactly its parameters, or a list of optimizers that do together.
        Default: Adam, lr 1e-2; for a structured response that of w₀.
    every: ≥ 1, number of inner steps from one response step to the next. At the start of a run it is 1. It grows by 1 after
        each 16 inner steps, up to `every`, and later as a cycle does (`HyperSettings`, longest_cycle). Each step is unbiased;
        with a larger number Θ moves less often. Default: 4.
    fraction: in (0, 1], part of each batch that the response step sees. Its gradient is unbiased, except for the statistics of
        batch norms. Batches that rows alone do not split, such as graphs with their nodes, stay whole. Default: 1.0.
    widening: ≥ 1. Near the ends of a range ε is enlarged in the response step, at most by this factor. Default: 2.0.
    windows: ≥ 1, number of windows in a row that share one ε. More than 1 lets the tangent reach back over them: the perturbed
        network goes on with its own state. 1 begins each window with the state of the inner step and a tangent of zero. More
        than 1 needs every=1, and a network that carries a state. Default: 1.
    perturb: "example" draws one ε per example (the paper), "batch" one for all examples. "auto" draws one per example where
        the network allows it. Where a batch norm joins the examples, it draws one for all the more often, the further the
        network overfits. Default: "auto".

    Raises ValueError that lists every number out of range, and TypeError for a value of another kind.
    """

    keyword: ClassVar[str] = "response"
    optimizer: OptimizerLike = None
    every: int = RESPONSE_EVERY
    fraction: float = 1.0
    widening: float = 2.0
    windows: int = 1
    perturb: PerturbMode = "auto"


@explains_unknown
@dataclass(frozen=True, kw_only=True, repr=False)
class HyperSettings(SettingsGroup):
    """How λ and σ are tuned, and when.

    optimizer: of λ, as that of `ResponseSettings`. Default: `fxstn.optim.SettlingAdam`. Its rate falls from 0.4, and it shrinks
        λ's step when the gradient is noisy.
    scale_optimizer: of σ, which is learned where tune_scale is True. Default: RMSprop, lr 1e-2.
    train_steps: T_train ≥ 1, number of inner steps of a cycle, at first. Default: 5.
    longest_cycle: ≥ 1, number of inner steps up to which a cycle grows while the rate of a `SettlingAdam` falls: after n hyper
        steps it has train_steps √(n/settle) of them, train_steps at least, and the intervals of response steps grow alike.
        Any number up to train_steps: cycles stay as they are. Default: 40.
    valid_steps: T_valid ≥ 1, number of hyper steps at the end of a cycle. Default: 1.
    warmup_epochs: ≥ 0, number of epochs at the start without hyper steps. Default: 0.
    fraction: in (0, 1], part of each validation batch that the hyper step sees. Default: 1.0.
    inner_correction: c ≥ 0, how much of the training gradient is subtracted from λ's gradient. 1 removes what training would do
        anyway; 0 is the paper. The hypergradient is Θᵀ(∇L_V − c ∇L_T), with ∇L_T the mean over the last train_steps
        inner steps. Where the weights are at their best ∇L_T is zero and c has no effect. To first order ∇L_V − ∇L_T is ∇L_V
        after a Newton step of the training loss, if both losses have about the same curvature. Method "stn" does not use it.
        Default: 1.0.
    entropy_weight: τ ≥ 0, weight of the entropy of ε. A larger weight keeps σ larger, where tune_scale is True.
        Default: 0.001.
    tune_scale: True learns σ, in a hyper step that draws ε (Eq. 2.7). False keeps σ, and the hyper step takes the gradient at λ
        itself. Default: False.
    recalibrate: ≥ 0, number of training batches, those of the last steps, on which evaluation estimates the statistics of batch
        norms anew, in eval mode, and draws them towards the running ones where they are noisy (docs/results/hypergradient.md).
        Their loss in eval mode also says how far the network overfits, which limits the steps of λ (`fxstn.optim.set_gap`). 0:
        the statistics that training keeps, and no limits. Default: 10.
    evaluation_share: in (0, 1], the part of the arithmetic of training that evaluations may take besides the validation data:
        for `recalibrate` and for diagnostics. Where epochs are short they take fewer batches, or leave an epoch out; statistics
        of batch norms are estimated on at least four, or three of 43 examples or more. 1: on all batches, and in every epoch.
        Default: 0.02.

    Raises ValueError that lists every number out of range, and TypeError for a value of another kind.
    """

    keyword: ClassVar[str] = "hyper"
    optimizer: OptimizerLike = None
    scale_optimizer: OptimizerLike = None
    train_steps: int = CYCLE
    longest_cycle: int = LONGEST_CYCLE
    valid_steps: int = 1
    warmup_epochs: int = 0
    fraction: float = 1.0
    inner_correction: float = 1.0
    entropy_weight: float = 1e-3
    tune_scale: bool = False
    recalibrate: int = 10
    evaluation_share: float = 0.02


@explains_unknown
@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointSettings(SettingsGroup):
    """Where a run is saved, how often, and how it recovers from a loss that is no longer finite.

    out_dir: folder of history.csv, last.pt and best.pt. A run that finds its last.pt there resumes, and ends as if it had never
        stopped. A folder that cannot be written to gives a warning; training goes on. Default: None, no files.
    save_minutes: > 0, minutes between checkpoints within an epoch. A checkpoint is also written at SIGTERM and Ctrl-C.
        Default: 30.0.
    keep: ≥ 1, number of checkpoints in out_dir: last.pt, last.1.pt, … Default: 2.
    rollbacks: ≥ 0, how often a run may go back. When a loss becomes NaN, infinite or 10⁴ times what it was, the run goes back
        to its last checkpoint, halves the learning rate of that loss's parameters and goes on, checking every batch. Without
        out_dir this needs a copy of the run in main memory; 0 makes none. Default: 2.

    Raises ValueError that lists every number out of range, and TypeError for a value of another kind.
    """

    keyword: ClassVar[str] = "checkpoints"
    out_dir: str | Path | None = None
    save_minutes: float = 30.0
    keep: int = 2
    rollbacks: int = 2


@explains_unknown
@dataclass(frozen=True, kw_only=True, repr=False)
class ExecutionSettings(SettingsGroup):
    """Where and in what precision a run computes.

    device: of the run. Default: None, that of the network.
    compile: True runs steps through torch.compile, each as one graph (docs/guides/runner.md). A dict has its
        options. Default: False.
    autocast: dtype of the losses' forward, such as torch.bfloat16; parameters keep theirs. torch.float16 scales the losses,
        and a step whose gradient overflows counts for nothing. Default: None, no autocast.
    memory_format: of weights and 4-d (5-d) inputs, such as torch.channels_last. Default: None, as they are.

    Raises TypeError for a value of another kind, ValueError for another dtype.
    """

    keyword: ClassVar[str] = "execution"
    device: torch.device | str | None = None
    compile: bool | dict[str, Any] = False
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None

    def compile_options(self, device: torch.device) -> dict[str, Any] | None:
        """The options of torch.compile for a run on a device, by default with CUDA graphs; None where nothing is compiled."""
        if not self.compile:
            return None
        options = self.compile if isinstance(self.compile, dict) else {}
        own = device.type != "cuda" or not {"mode", "options", "backend"}.isdisjoint(options)
        return options if own else {"mode": "reduce-overhead"} | options


GROUPS = (ResponseSettings, HyperSettings, CheckpointSettings, ExecutionSettings)


def check_keywords(
    owner: str, keywords: Iterable[str], names: Sequence[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raises TypeError, which says what may be meant, for a keyword that is none of the names.

    owner: what takes the keywords.
    elsewhere: {keyword that owner might be expected to take: what to do instead}.
    """
    unknown = next((name for name in keywords if name not in names), None)
    if unknown is None:
        return
    groups = [group for group in GROUPS if group.keyword in names] or list(
        GROUPS
    )  # a group itself may stand for another
    remedies = {
        spelling: f"did you mean {group.keyword}=fxstn.{group.__name__}({field.name}=...)?"
        for group in reversed(groups)  # of equal names that of the first group
        for field in fields(group)
        for spelling in (field.name, f"{group.keyword}_{field.name}")
    }
    remedies |= dict(elsewhere or {}) | {name: f"did you mean {name!r}?" for name in names}
    members = [field.name for group in groups for field in fields(group)]
    close = get_close_matches(unknown, remedies, 1, cutoff=0.8)  # with a prefix, all names of a group are alike
    close = close or get_close_matches(unknown, [*names, *members], 1)
    remedy = remedies[close[0]] if close else f"help(fxstn.{owner}) lists them"
    raise TypeError(f"{owner} has no argument {unknown!r}; {remedy}")


class Preset(TypedDict):
    """Groups of settings that go together, as keywords."""

    response: ResponseSettings
    hyper: HyperSettings


PAPER: Preset = {
    "response": ResponseSettings(every=1, widening=1.0, perturb="example"),
    "hyper": HyperSettings(optimizer=rmsprop, longest_cycle=5, tune_scale=True, inner_correction=0.0),
}
