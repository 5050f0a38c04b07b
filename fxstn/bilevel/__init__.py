"""Bilevel training: the three objectives, the problem that has them, and a runner that alternates their steps.

A step: problem, network_problem, sequences, objectives, losses, perturbation, targets, target_rows, counts, steps, noise,
foreign, scaling, updates, optimizers, combined, optim, evidence.
The method: tuner, cadence, backtracking, settings.
A run around it: run, runner, build, refit, initial, training, run_settings, arguments, checks, callbacks, batches, loaders,
sources, shared_data, workers, validation, stop, clock, distributed.
Evaluation: running_means, evaluation, allowance, totals, recalibration, norm_statistics, temporary.
What a run tells: history, schedule, outcome, plots, progress, faults.
Its files: state, complete_state, best_model, starts, run_parts, specs, records, plain, checkpoint, checkpoint_manager,
writer, lock, files.
"""

from fxstn.bilevel import optim
from fxstn.bilevel.callbacks import EarlyStopping
from fxstn.bilevel.distributed import average_gradients
from fxstn.bilevel.evaluation import accuracy
from fxstn.bilevel.faults import DivergedError, RunWarning
from fxstn.bilevel.history import History
from fxstn.bilevel.objectives import cross_entropy, general_loss, hyper_loss, response_loss
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.runner import BilevelRunner
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.sequences import CarriedState
from fxstn.bilevel.settings import PAPER, CheckpointSettings, ExecutionSettings, HyperSettings, ResponseSettings

__all__ = [
    "PAPER",
    "BilevelProblem",
    "BilevelRunner",
    "CarriedState",
    "CheckpointSettings",
    "DivergedError",
    "EarlyStopping",
    "ExecutionSettings",
    "History",
    "HyperSettings",
    "ResponseSettings",
    "RunWarning",
    "Schedule",
    "accuracy",
    "average_gradients",
    "cross_entropy",
    "general_loss",
    "hyper_loss",
    "optim",
    "response_loss",
]
