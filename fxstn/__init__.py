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
    accuracy,
    average_gradients,
    general_loss,
    hyper_loss,
    optim,
    response_loss,
)
from fxstn.bilevel.losses import cross_entropy
from fxstn.frontends.decompositions.torchvision import register_operation
from fxstn.integrations.tensorboard import TensorBoard
from fxstn.ir.errors import Diagnostic, TransformError
from fxstn.network import SelfTuningNetwork
from fxstn.rules.own import register_rule
from fxstn.tools.explain import Explanation, explain
from fxstn.tools.report import write_report
from fxstn.tools.show import show
from fxstn.tools.verify import VerifyResult, verify
from fxstn.transform import transform

__all__ = [
    "PAPER",
    "BilevelProblem",
    "BilevelRunner",
    "Carried",
    "Diagnostic",
    "DivergedError",
    "Explanation",
    "History",
    "RunWarning",
    "Schedule",
    "SelfTuningNetwork",
    "TensorBoard",
    "TransformError",
    "VerifyResult",
    "accuracy",
    "average_gradients",
    "cross_entropy",
    "explain",
    "general_loss",
    "hp",
    "hyper_loss",
    "optim",
    "register_operation",
    "register_rule",
    "response_loss",
    "show",
    "transform",
    "verify",
    "write_report",
]
