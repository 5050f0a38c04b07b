"""fxstn: tune dozens of regularisation hyperparameters in one training run (Δ-STN, Bae & Grosse 2020)."""

from fxstn import hp
from fxstn.bilevel import (
    PAPER,
    BilevelProblem,
    BilevelRunner,
    Carried,
    DivergedError,
    History,
    RunWarning,
    Schedule,
    TensorBoard,
    accuracy,
    average_gradients,
    general_loss,
    hyper_loss,
    response_loss,
)
from fxstn.errors import Problem, TransformError
from fxstn.explain import Explanation, explain
from fxstn.losses import cross_entropy
from fxstn.network import SelfTuningNetwork
from fxstn.operations import register_operation
from fxstn.report import write_report
from fxstn.rules.own import register_rule
from fxstn.show import show
from fxstn.transform import transform
from fxstn.verify import Report, verify

__all__ = [
    "PAPER",
    "BilevelProblem",
    "BilevelRunner",
    "Carried",
    "DivergedError",
    "Explanation",
    "History",
    "Problem",
    "Report",
    "RunWarning",
    "Schedule",
    "SelfTuningNetwork",
    "TensorBoard",
    "TransformError",
    "accuracy",
    "average_gradients",
    "cross_entropy",
    "explain",
    "general_loss",
    "hp",
    "hyper_loss",
    "register_operation",
    "register_rule",
    "response_loss",
    "show",
    "transform",
    "verify",
    "write_report",
]
