"""Tangent rules: one per canonical operation, by subject. A new tangent rule is a line in one of these files."""

from fxstn.rules import (
    activation,
    arithmetic,
    assign,
    attention,
    complex,
    constant,
    detection,
    index,
    layers,
    loss,
    matmul,
    norm,
    pointwise,
    pool,
    recurrent,
    reduce,
    resample,
    shape,
    sparse,
)
from fxstn.rules.fallback import NoRule
from fxstn.rules.registry import RULES, Rule, apply_rule, kind_of

__all__ = [
    "RULES",
    "NoRule",
    "Rule",
    "activation",
    "apply_rule",
    "arithmetic",
    "assign",
    "attention",
    "complex",
    "constant",
]
__all__ += [
    "detection",
    "index",
    "layers",
    "loss",
    "matmul",
    "norm",
    "pointwise",
    "pool",
    "recurrent",
    "reduce",
    "resample",
]
__all__ += ["kind_of", "shape", "sparse"]
