"""Bilevel training: the three objectives, the problem that has them, and a runner that alternates their steps."""

from fxstn.bilevel import optim
from fxstn.bilevel.distributed import average_gradients
from fxstn.bilevel.faults import DivergedError, RunWarning
from fxstn.bilevel.history import History
from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.runner import PAPER, BilevelRunner
from fxstn.bilevel.schedule import Schedule
from fxstn.bilevel.sequences import Carried
from fxstn.bilevel.tally import accuracy

__all__ = [
    "PAPER",
    "BilevelProblem",
    "BilevelRunner",
    "Carried",
    "DivergedError",
    "History",
    "RunWarning",
    "Schedule",
    "accuracy",
    "average_gradients",
    "general_loss",
    "hyper_loss",
    "optim",
    "response_loss",
]
