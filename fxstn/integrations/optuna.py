"""Optuna: a search that stops hopeless trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fxstn.bilevel.callbacks import HasHistory
from fxstn.bilevel.checks import is_own_column

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


def report_to(trial: BaseTrial, column: str = "valid_loss") -> Callable[[HasHistory], None]:
    """A callback of BilevelRunner or fxstn.tune that reports each row of the history to a trial, at step = epoch.

    trial: of a study of one objective.
    column: of the history. A row that does not have it is not reported.

    The callback raises optuna.TrialPruned where the study's pruner gives the trial up; `study.optimize` takes it. It raises
    KeyError for a column that there is none of. To begin a search with the values that a run has tuned:
    `study.enqueue_trial(run.history.best_values())`. Raises ImportError without optuna (fxstn[optuna]).
    """
    try:
        from optuna import TrialPruned
    except ImportError as error:
        raise ImportError("report_to needs optuna: pip install 'fxstn[optuna]'") from error

    def report(run: HasHistory) -> None:
        row = run.history.rows[-1]
        if column not in row and is_own_column(column):  # short epochs do not measure everything
            return
        epoch, value = int(row["epoch"]), run.history[column][-1]
        trial.report(value, epoch)
        if trial.should_prune():
            raise TrialPruned(f"pruned after epoch {epoch}, at {column}={value:.4g}")

    return report
