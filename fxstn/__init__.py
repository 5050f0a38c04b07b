"""fxstn: tune dozens of regularisation hyperparameters in one training run (Δ-STN, Bae & Grosse 2020)."""

from fxstn import hp
from fxstn.bilevel import BilevelRunner, DivergedError, History, accuracy, general_loss, hyper_loss, response_loss
from fxstn.errors import Problem, TransformError
from fxstn.network import SelfTuningNetwork
from fxstn.transform import transform

__all__ = [
    "BilevelRunner",
    "DivergedError",
    "History",
    "Problem",
    "SelfTuningNetwork",
    "TransformError",
    "accuracy",
    "general_loss",
    "hp",
    "hyper_loss",
    "response_loss",
    "transform",
]
