"""Optuna: a search that stops hopeless trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fxstn.bilevel.callbacks import HasHistory

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


def report_to(trial: BaseTrial, column: str = "valid_loss") -> Callable[[HasHistory], None]:
    """A callback of BilevelRunner or fxstn.tune that reports each row of the history to a trial, at step = epoch.

    trial: of a study of one objective.
    column: of the history.

    The callback raises optuna.TrialPruned where the study's pruner gives the trial up; `study.optimize` takes it. To begin a
    search with the values that a run has tuned: `study.enqueue_trial(run.history.best_values())`. Raises ImportError without
    optuna (fxstn[optuna]).
    """
    try:
        from optuna import TrialPruned
    except ImportError as error:
        raise ImportError("report_to needs optuna: pip install 'fxstn[optuna]'") from error

    def report(run: HasHistory) -> None:
        row = run.history.rows[-1]
        epoch = int(row["epoch"])
        trial.report(row[column], epoch)
        if trial.should_prune():
            raise TrialPruned(f"pruned after epoch {epoch}, at {column}={row[column]:.4g}")

    return report
