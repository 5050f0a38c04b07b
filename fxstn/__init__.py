"""fxstn: tune dozens of regularisation hyperparameters in one training run (Δ-STN, Bae & Grosse 2020)."""

import sys
from typing import TYPE_CHECKING

from fxstn.tools.lazy import LazyPackage

if TYPE_CHECKING:
    from fxstn import hp as hp
    from fxstn.bilevel import PAPER as PAPER
    from fxstn.bilevel import BilevelProblem as BilevelProblem
    from fxstn.bilevel import BilevelRunner as BilevelRunner
    from fxstn.bilevel import CarriedState as CarriedState
    from fxstn.bilevel import CheckpointSettings as CheckpointSettings
    from fxstn.bilevel import DivergedError as DivergedError
    from fxstn.bilevel import EarlyStopping as EarlyStopping
    from fxstn.bilevel import ExecutionSettings as ExecutionSettings
    from fxstn.bilevel import History as History
    from fxstn.bilevel import HyperSettings as HyperSettings
    from fxstn.bilevel import ResponseSettings as ResponseSettings
    from fxstn.bilevel import RunWarning as RunWarning
    from fxstn.bilevel import Schedule as Schedule
    from fxstn.bilevel import accuracy as accuracy
    from fxstn.bilevel import average_gradients as average_gradients
    from fxstn.bilevel import cross_entropy as cross_entropy
    from fxstn.bilevel import general_loss as general_loss
    from fxstn.bilevel import hyper_loss as hyper_loss
    from fxstn.bilevel import optim as optim
    from fxstn.bilevel import response_loss as response_loss
    from fxstn.frontends.decompositions.torchvision import register_operation as register_operation
    from fxstn.integrations.detection import DetectionLosses as DetectionLosses
    from fxstn.integrations.detection import detection_loss as detection_loss
    from fxstn.integrations.tensorboard import TensorBoard as TensorBoard
    from fxstn.ir.errors import Diagnostic as Diagnostic
    from fxstn.ir.errors import TransformError as TransformError
    from fxstn.loops.tune import LoopTuner as LoopTuner
    from fxstn.loops.tune import tune as tune
    from fxstn.network import SelfTuningNetwork as SelfTuningNetwork
    from fxstn.rules.own import register_rule as register_rule
    from fxstn.tools.explain import Explanation as Explanation
    from fxstn.tools.explain import explain as explain
    from fxstn.tools.hold_out import hold_out as hold_out
    from fxstn.tools.report import write_report as write_report
    from fxstn.tools.show import show as show
    from fxstn.tools.verify import VerifyResult as VerifyResult
    from fxstn.tools.verify import verify as verify
    from fxstn.transform import transform as transform

__version__: str  # is looked up when it is read

EXPORTS = {
    "fxstn.bilevel": [
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
    ],
    "fxstn.frontends.decompositions.torchvision": ["register_operation"],
    "fxstn.integrations.detection": ["DetectionLosses", "detection_loss"],
    "fxstn.integrations.tensorboard": ["TensorBoard"],
    "fxstn.ir.errors": ["Diagnostic", "TransformError"],
    "fxstn.loops.tune": ["LoopTuner", "tune"],
    "fxstn.network": ["SelfTuningNetwork"],
    "fxstn.rules.own": ["register_rule"],
    "fxstn.tools.explain": ["Explanation", "explain"],
    "fxstn.tools.hold_out": ["hold_out"],
    "fxstn.tools.report": ["write_report"],
    "fxstn.tools.show": ["show"],
    "fxstn.tools.verify": ["VerifyResult", "verify"],
    "fxstn.transform": ["transform"],
}  # the imports above, which type checkers read, once more for Python
__all__ = ["hp", *(name for names in EXPORTS.values() for name in names)]

sys.modules[__name__].__class__ = LazyPackage
