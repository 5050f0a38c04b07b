"""Run: what a runner, and a tuner in a loop of somebody else's, tell of themselves; reports and callbacks read it."""

from __future__ import annotations

import reprlib
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from fxstn.bilevel.history import History
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.run_settings import ELSEWHERE, FORM, SettingsDict
from fxstn.bilevel.totals import Metrics
from fxstn.bilevel.tuner import Tuner
from fxstn.bilevel.updates import Updates

READ_ONCE = {*FORM, *SettingsDict.__annotations__, *ELSEWHERE}  # names that a run reads when it is made


class Run:
    """Base of whatever trains around a `Tuner`.

    stn: the network, or a problem of the user's own.
    settings: as texts.
    optimizers: by the name of their argument.

    Raises AttributeError where an attribute is set by hand that would act in part, or not at all.
    """

    _free: tuple[str, ...] = ("callbacks", "progress", "schedule", "refit_history")  # what acts when it is set
    _lasting = "runner.save(path) writes it, and runner.load(path) of a new one goes on from there"
    _anew = "make a new BilevelRunner, which with the same out_dir goes on from the last file"
    _tuner: Tuner
    stn: Any
    problem: BilevelProblem
    device: torch.device
    settings: dict[str, str]
    train_loader: Any
    valid_loader: Any
    metrics: Metrics
    updates: Updates
    optimizers: dict[str, torch.optim.Optimizer]
    history: History

    def __setattr__(self, name: str, value: object) -> None:
        own = vars(self)
        late = name in own or (name in READ_ONCE and "_tuner" in own)
        if late and not name.startswith("_") and name not in self._free:
            what = f"{type(self).__name__}.{name} cannot be set to {reprlib.repr(value)} by hand"
            raise AttributeError(f"{what}: the run would not heed it, or only in part; {self._anew}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Its steps so far, and what its history has; less where its making has failed."""
        if "history" not in vars(self):
            return f"{type(self).__name__}(unfinished)"
        steps = f"steps={self.steps}, response_steps={self.response_steps}, hyper_steps={self.hyper_steps}"
        return f"{type(self).__name__}({steps}, device={self.device}, history={self.history!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError: loaders, hooks and a network that others share cannot be copied or pickled."""
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled; {self._lasting}")

    @property
    def steps(self) -> int:
        """Steps of w₀ done, without those that overflowed in float16; a cycle may span epochs."""
        return self._tuner.counters.steps

    @property
    def response_steps(self) -> int:
        """Response steps done; those along with steps of w₀ (method "stn") are not counted."""
        return self._tuner.counters.response_steps

    @property
    def hyper_steps(self) -> int:
        """Hyper steps done."""
        return self._tuner.counters.hyper_steps

    def values(self) -> dict[str, float]:
        """{name: value} of the hyperparameters, as they are now."""
        return self.problem.values()

    def report(self, path: str | Path, title: str = "fxstn run") -> None:
        """Write a report, an HTML file that needs no other file. Raises as `fxstn.write_report`.

        path: of the file.
        title: the heading.
        """
        self.close_epoch()
        import_module("fxstn.tools.report").write_report(
            self, path, title=title
        )  # which reads runs, and is not part of them

    def close_epoch(self) -> None:
        """End an epoch that somebody else's loop has broken off."""

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(epoch, text) of the signs of trouble so far, and of every time the run went back; those before a resume too."""
        return list(self._tuner.monitors.warnings)
