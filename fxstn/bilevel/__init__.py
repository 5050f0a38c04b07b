"""Bilevel training: the three objectives, and a runner that alternates them."""

from fxstn.bilevel.history import History
from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.runner import PAPER, BilevelRunner, DivergedError, accuracy
from fxstn.bilevel.sequences import Carried

__all__ = [
    "PAPER",
    "BilevelRunner",
    "Carried",
    "DivergedError",
    "History",
    "accuracy",
    "general_loss",
    "hyper_loss",
    "response_loss",
]
