"""The tangent rules. Importing this package fills `RULES`."""

from fxstn.rules import assign, layers, norm, pointwise, pool, shape
from fxstn.rules.registry import RULES, NoRule, Rule, apply_rule

__all__ = ["RULES", "NoRule", "Rule", "apply_rule", "assign", "layers", "norm", "pointwise", "pool", "shape"]
