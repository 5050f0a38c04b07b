"""Regularisers: what is dropped besides units, and penalties on activations and on the Jacobian."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Never, Unpack, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fxstn.hp.checks import FLAG, POSITIVE, Check, whole
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.operation import Operation, Settings, Strength, WithProbability
from fxstn.hp.specs import Choice, Choices, Coefficient, Spec
from fxstn.hp.terms import Auxiliary
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis
from fxstn.ops.drop_block import block_multiplier
from fxstn.ops.noise import by_example, locked_mask, row_mask, uniform, word_mask
from fxstn.ops.precision import widen

if TYPE_CHECKING:
    from torchvision import ops


class StochasticDepth(Operation):
    """Probability, in [0, 0.95], that an example skips a residual branch (Huang et al. 2016, arXiv 1603.09382).

    Takes over `torchvision.ops.StochasticDepth` by row, and modules of other classes that do the same, DropPath of timm say. It
    inserts nothing.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"stochastic_depth": Hyperparameter(0.1, 0, 0.95)}
    inserts = False
    apply = operator.mul

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        return {"stochastic_depth": cast(WithProbability, module).p}, {}

    @staticmethod
    def draw(x: Tensor, p: Strength) -> Tensor:
        return row_mask(x, p)


class LayerDrop(Operation):
    """Probability, in [0, 0.95], that an example skips a layer (Fan et al. 2020, arXiv 1909.11556).

    What the layer adds to its input is dropped; nothing is scaled. It takes over loops that skip layers at random, of Hugging
    Face's encoders say, where transform gets example inputs: every layer has a probability of its own, and is computed always.
    It inserts nothing.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"layer_drop": Hyperparameter(0.1, 0, 0.95)}
    inserts = False
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, p: Strength) -> Tensor:
        return (uniform(x) >= by_example(p, x)).to(x.dtype)


class DropBlock(Operation):
    """Share, in [0, 0.95], of a feature map that blocks cover, about (Ghiasi et al. 2018, arXiv 1810.12890).

    Takes over `torchvision.ops.DropBlock2d` and `DropBlock3d`, and modules of other classes that do the same, timm's say. After
    other modules that a pattern matches, one is inserted.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    block_size: side of a block, at most that of the map.
    gamma_scale: factor of the probability of a block.
    coupled: all channels have the same blocks.
    inside: blocks are whole; else they may be cut at the borders of the map.
    scaled: what is left is scaled to keep its mean, over the batch at one strength, else in each example.
    """

    numbers: Mapping[str, Hyperparameter] = {"drop_block": Hyperparameter(0.1, 0, 0.95)}
    defaults: Mapping[str, object] = {
        "block_size": 7, "gamma_scale": 1.0, "coupled": True, "inside": False, "scaled": True
    }  # fmt: skip
    checks: Mapping[str, Check] = {
        "block_size": whole(1),
        "gamma_scale": POSITIVE,
        "coupled": FLAG,
        "inside": FLAG,
        "scaled": FLAG,
    }
    apply = operator.mul

    @classmethod
    def read(cls, module: nn.Module) -> tuple[Mapping[str, float], Settings]:
        own = cast("ops.DropBlock2d", module)
        return {"drop_block": own.p}, {"block_size": own.block_size, "coupled": False, "inside": True}

    @staticmethod
    def draw(x: Tensor, p: Strength, **settings: Any) -> Tensor:
        return block_multiplier(x, p, **settings)


class LockedDropout(Operation):
    """Rate, in [0, 0.95], of variational dropout (Gal & Ghahramani 2016, arXiv 1512.05287).

    The mask of an example is the same at all times. It is inserted after the matched modules. Values that are not floating
    point, such as words, are left alone.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    axis: of time; 1 for values (batch, time, ...), 0 for (time, batch, ...).
    """

    numbers: Mapping[str, Hyperparameter] = {"locked_dropout": Hyperparameter(0.1, 0, 0.95)}
    defaults: Mapping[str, object] = {"axis": 1}
    checks: Mapping[str, Check] = {"axis": whole(0)}
    examples = None
    apply = operator.mul

    @staticmethod
    def draw(x: Tensor, p: Strength, axis: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor | int:
        return locked_mask(x, p, axis, batch_axis)


class EmbeddingDropout(Operation):
    """Rate, in [0, 0.95], at which words are dropped (Gal & Ghahramani 2016; Merity et al. 2017, arXiv 1708.02182).

    A word, a row of an embedding's table, is dropped wherever it occurs in the batch. Examples at a higher rate drop more of
    the same words. It acts on the lookups of the matched modules, with a draw for each lookup. Without a pattern: all lookups.
    It does not act on a layer whose weight is tied to the table.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"embedding_dropout": Hyperparameter(0.1, 0, 0.95)}
    examples = None
    follows = staticmethod(F.embedding)
    apply = operator.mul

    @staticmethod
    def draw(lookup: tuple[Tensor, ...], p: Strength, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
        return word_mask(lookup[0], lookup[1], p, batch_axis)


class DropConnect(Spec):
    """Probability, in [0, 0.95], that a weight is dropped (Wan et al. 2013).

    There is one mask for the whole batch, and so one perturbation. It acts on the weights (no biases, no norms) of the matched
    linear and convolution layers. Without a pattern: all. A pattern may also match one weight by its full name, if it does not
    match the layer of that weight.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"drop_connect": Hyperparameter(0.1, 0, 0.95, by_batch=True)}


class Activity(Auxiliary, Coefficient):
    """Base of penalties λ · measure(h) on what the matched modules put out, the outermost of the matches.

    A subclass has `numbers`, one coefficient, and a function measure(h) → (batch,). h is (batch, ...), or has the batch along
    `examples`. In the response step it is the linearised output of the module, h + dh.

    Raises TypeError without a pattern.
    """

    measure: ClassVar[Callable[..., Tensor]]

    def __init__(self, *where: str, **choices: Unpack[Choices]) -> None:
        if len(self.numbers) != 1:
            raise TypeError(f"hp.{type(self).__name__} has {len(self.numbers)} numbers in place of one coefficient; take a "
                            "subclass, such as hp.ActivationDecay")  # fmt: skip
        if not where:
            raise TypeError(f"hp.{type(self).__name__} needs the names of modules whose outputs it penalises")
        super().__init__(*where, **choices)

    def penalty(self, value: tuple[Tensor, ...]) -> Tensor | float:
        strength, h = value
        return (strength * self.measure(widen(h))).mean()


class ActivationDecay(Activity):
    """Coefficient of the mean square of a module's output, on a log scale (Merity et al. 2017, arXiv 1708.01009).

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    """

    numbers: Mapping[str, Hyperparameter] = {"activation_decay": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    @staticmethod
    def measure(h: Tensor) -> Tensor:
        """The mean square of each example, (batch,), of what the module puts out, h (batch, ...)."""
        return h.square().flatten(1).mean(1)


class TemporalDecay(Activity):
    """Coefficient of the mean square of the change of a module's output from one time to the next, on a log scale (Merity et
    al. 2017, arXiv 1708.01009). It is 0 for a single time.

    where, init, low, high, scale, shared, perturb: see `hp.Spec`.
    axis: of time; 1 for outputs (batch, time, ...), 0 for (time, batch, ...). Raises ValueError for one counted from the end.
    """

    numbers: Mapping[str, Hyperparameter] = {"temporal_decay": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    def __init__(self, *where: str, axis: int = 1, **choices: Unpack[Choices]) -> None:
        words, is_right = whole(0)
        if not is_right(axis):
            raise ValueError(f"hp.TemporalDecay: axis={axis!r} must be {words}, counted from the front")
        self.axis, self.examples = axis, int(axis == 0)
        super().__init__(*where, **choices)

    def measure(self, h: Tensor) -> Tensor:
        """The mean square of the change of each example, (batch,), of what the module puts out, h (batch, time, ...).

        Raises ValueError where h has no such axis.
        """
        if self.axis >= h.dim():
            raise ValueError(f"hp.TemporalDecay: axis={self.axis} cannot be that of time in an output of shape "
                             f"{tuple(h.shape)}; give that of the matched modules' outputs")  # fmt: skip
        change = h.diff(dim=self.axis).movedim(int(self.axis == 0), 0).flatten(1)
        return change.square().sum(1) / max(1, change.shape[1])


class JacobianNorm(Coefficient):
    """Coefficient λ of λ ‖∂y/∂x‖², on a log scale: the squared Frobenius norm of the Jacobian of the (linearised) output with
    respect to the floating point inputs.

    init, low, high, scale, perturb: see `hp.Spec`.
    projections: random projections that estimate it without bias, ‖∂⟨u, y⟩/∂x‖² with u of random signs (Hutchinson 1990;
        Hoffman et al. 2019, arXiv 1908.02729). None: the sum over all outputs, which is exact; so is a single output.

    Each projection takes a backward pass that is differentiated again. Operations without a second derivative are refused
    when they run.
    """

    numbers: Mapping[str, Hyperparameter] = {"jacobian_norm": Hyperparameter(1e-3, 1e-6, 10, log=True)}

    def __init__(self, *, init: Choice = None, low: Choice = None, high: Choice = None, scale: Choice = None,
                 perturb: str | None = None, projections: int | None = 1, **unknown: Never) -> None:  # fmt: skip
        self.check_arguments(unknown)
        if projections is not None and projections < 1:
            raise ValueError(f"hp.JacobianNorm: projections={projections} must be at least 1, or None for all outputs")
        self.projections = projections
        super().__init__(init=init, low=low, high=high, scale=scale, shared=True, perturb=perturb)
