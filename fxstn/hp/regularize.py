"""Regularisers: what is dropped besides units, and penalties on activations and on the Jacobian."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from fxstn.hp.operation import Operation
from fxstn.hp.specs import Choice, Coefficient, Number, Spec
from fxstn.hp.terms import Aside
from fxstn.layers.noise import by_example, uniform


class StochasticDepth(Operation):
    """Probability, in [0, 0.95], that an example skips a residual branch (Huang et al. 2016, arXiv 1603.09382).

    Takes over `torchvision.ops.StochasticDepth` by row; inserts nothing.
    """

    numbers: Mapping[str, Number] = {"stochastic_depth": Number(0.05, 0, 0.95)}
    inserts = False
    apply = operator.mul

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        return {"stochastic_depth": module.p}, {}

    @staticmethod
    def draw(x: Tensor, p: Tensor | float) -> Tensor:
        p = by_example(p, x)
        return ((uniform(x) >= p) / (1 - p)).to(x.dtype)


class DropConnect(Spec):
    """Probability, in [0, 0.95], that a weight is dropped (Wan et al. 2013): one mask for the whole batch, and so one
    perturbation, on the weights (no biases, no norms) of the matched linear and convolution layers."""

    numbers: Mapping[str, Number] = {"drop_connect": Number(0.05, 0, 0.95, by_batch=True)}


class Activity(Aside, Coefficient):
    """Base of penalties λ · measure(h) on what the matched modules put out, the outermost of the matches.

    A subclass has `numbers`, one coefficient, and a static function measure(h) → (batch,), of h (batch, ...); in the
    response step h is the linearised output of the module, h + dh. Raises TypeError without a pattern.
    """

    measure: ClassVar[Callable[..., Tensor]]

    def __init__(self, *where: str, **choices: Any) -> None:
        if not where:
            raise TypeError(f"hp.{type(self).__name__} needs the names of modules whose outputs it penalises")
        super().__init__(*where, **choices)

    def penalty(self, value: Any) -> Tensor | float:
        strength, h = value
        return (strength * self.measure(h)).mean()


class ActivationDecay(Activity):
    """Coefficient of the mean square of a module's output, on a log scale (Merity et al. 2017, arXiv 1708.01009)."""

    numbers: Mapping[str, Number] = {"activation_decay": Number(1e-3, 1e-6, 10, log=True)}

    @staticmethod
    def measure(h: Tensor) -> Tensor:
        return h.square().flatten(1).mean(1)


class JacobianNorm(Coefficient):
    """Coefficient λ of λ ‖∂y/∂x‖², the squared Frobenius norm of the Jacobian of the (linearised) output with respect to the
    floating point inputs, on a log scale.

    projections: n random ones estimate it without bias, ‖∂⟨u, y⟩/∂x‖² with u of random signs (Hutchinson 1990; Hoffman et al.
    2019, arXiv 1908.02729); None adds up all outputs, exactly. A single output is exact in any case. Each takes a backward
    pass that is differentiated again: operations without a second derivative are refused when they run.
    """

    numbers: Mapping[str, Number] = {"jacobian_norm": Number(1e-3, 1e-6, 10, log=True)}

    def __init__(self, *, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 perturb: str | None = None, projections: int | None = 1) -> None:  # fmt: skip
        if projections is not None and projections < 1:
            raise ValueError(f"hp.JacobianNorm: projections={projections} must be at least 1, or None for all outputs")
        self.projections = projections
        super().__init__(init=init, low=low, high=high, scale=scale, shared=True, perturb=perturb)
