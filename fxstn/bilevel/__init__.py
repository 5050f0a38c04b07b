"""Bilevel training: the three objectives, and a runner that alternates them."""

from fxstn.bilevel.history import History
from fxstn.bilevel.objectives import general_loss, hyper_loss, response_loss
from fxstn.bilevel.runner import BilevelRunner, DivergedError, accuracy

__all__ = ["BilevelRunner", "DivergedError", "History", "accuracy", "general_loss", "hyper_loss", "response_loss"]
