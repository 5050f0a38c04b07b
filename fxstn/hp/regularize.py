"""Regularisers: what is dropped besides units, and penalties on activations and on the Jacobian."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation
from fxstn.hp.specs import Choice, Coefficient, Spec
from fxstn.hp.terms import Auxiliary
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ops.noise import by_example, locked_mask, uniform, word_mask


class StochasticDepth(Operation):
    """Probability, in [0, 0.95], that an example skips a residual branch (Huang et al. 2016, arXiv 1603.09382).

    Takes over `torchvision.ops.StochasticDepth` by row; inserts nothing.
    """

    numbers: Mapping[str, Hyperparameter] = {"stochastic_depth": Hyperparameter(0.05, 0, 0.95)}
    inserts = False
    apply = operator.mul

    @classmethod
    def read(cls, module: Any) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        return {"stochastic_depth": module.p}, {}

    @staticmethod
    def draw(x: Tensor, p: Tensor | float) -> Tensor:
        p = by_example(p, x)
        return ((uniform(x) >= p) / (1 - p)).to(x.dtype)


class LockedDropout(Operation):
    """Rate, in [0, 0.95], of variational dropout (Gal & Ghahramani 2016, arXiv 1512.05287): the mask of an example is the
    same at all times. axis: that of time; 1 for values (batch, time, ...), 0 for (time, batch, ...).

    Inserted after the matched modules; values that are not floating point, such as words, are left alone.
    """

    numbers: Mapping[str, Hyperparameter] = {"locked_dropout": Hyperparameter(0.05, 0, 0.95)}
    defaults: Mapping[str, Any] = {"axis": 1}
    examples = None
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, p: Tensor | float, axis: int, place: BatchAxis = BATCH_FIRST) -> Tensor | int:
        return locked_mask(x, p, axis, place)


class EmbeddingDropout(Operation):
    """Rate, in [0, 0.95], at which words are dropped, rows of an embedding's table, each wherever it occurs in the batch
    (Gal & Ghahramani 2016; Merity et al. 2017, arXiv 1708.02182). Examples at a higher rate drop more of the same words.

    Acts on the lookups of the matched modules, of all without a pattern, a draw for each; not on a layer whose weight is tied
    to the table.
    """

    numbers: Mapping[str, Hyperparameter] = {"embedding_dropout": Hyperparameter(0.05, 0, 0.95)}
    examples = None
    follows = staticmethod(F.embedding)
    apply = operator.mul

    @staticmethod
    def draw(lookup: tuple[Any, ...], p: Tensor | float, place: BatchAxis = BATCH_FIRST) -> Tensor:
        return word_mask(lookup[0], lookup[1], p, place)


class DropConnect(Spec):
    """Probability, in [0, 0.95], that a weight is dropped (Wan et al. 2013): one mask for the whole batch, and so one
    perturbation, on the weights (no biases, no norms) of the matched linear and convolution layers, all without a pattern. A
    pattern may also match a weight by its full name, where the layer that owns it is not matched."""

    numbers: Mapping[str, Hyperparameter] = {"drop_connect": Hyperparameter(0.05, 0, 0.95, by_batch=True)}


class Activity(Auxiliary, Coefficient):
    """Base of penalties λ · measure(h) on what the matched modules put out, the outermost of the matches.

    A subclass has `numbers`, one coefficient, and a function measure(h) → (batch,), of h (batch, ...) or with the batch
    along `examples`; in the response step h is the linearised output of the module, h + dh. Raises TypeError without a pattern.
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

    numbers: Mapping[str, Hyperparameter] = {"activation_decay": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    @staticmethod
    def measure(h: Tensor) -> Tensor:
        return h.square().flatten(1).mean(1)


class TemporalDecay(Activity):
    """Coefficient of the mean square of the change of a module's output from one time to the next, on a log scale (Merity et
    al. 2017, arXiv 1708.01009); 0 for a single time. axis: that of time; 1 for outputs (batch, time, ...), 0 for
    (time, batch, ...). Raises ValueError for one counted from the end."""

    numbers: Mapping[str, Hyperparameter] = {"temporal_decay": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    def __init__(self, *where: str, axis: int = 1, **choices: Any) -> None:
        if axis < 0:
            raise ValueError(f"hp.TemporalDecay: axis={axis} must be counted from the front, 0 or more")
        self.axis, self.examples = axis, int(axis == 0)
        super().__init__(*where, **choices)

    def measure(self, h: Tensor) -> Tensor:
        change = h.diff(dim=self.axis).movedim(int(self.axis == 0), 0).flatten(1)
        return change.square().sum(1) / max(1, change.shape[1])


class JacobianNorm(Coefficient):
    """Coefficient λ of λ ‖∂y/∂x‖², the squared Frobenius norm of the Jacobian of the (linearised) output with respect to the
    floating point inputs, on a log scale.

    projections: n random ones estimate it without bias, ‖∂⟨u, y⟩/∂x‖² with u of random signs (Hutchinson 1990; Hoffman et al.
    2019, arXiv 1908.02729); None adds up all outputs, exactly. A single output is exact in any case. Each takes a backward
    pass that is differentiated again: operations without a second derivative are refused when they run.
    """

    numbers: Mapping[str, Hyperparameter] = {"jacobian_norm": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    def __init__(self, *, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 perturb: str | None = None, projections: int | None = 1) -> None:  # fmt: skip
        if projections is not None and projections < 1:
            raise ValueError(f"hp.JacobianNorm: projections={projections} must be at least 1, or None for all outputs")
        self.projections = projections
        super().__init__(init=init, low=low, high=high, scale=scale, shared=True, perturb=perturb)
