"""The hyperparameters of a network: λ, σ, their names, and perturbations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxstn.hp.bijection import Bijection
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.ir.input_errors import is_number
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.precision import WideModule


def inverse_softplus(scale: float) -> float:
    """The number whose softplus is `scale` > 0. From 40 on both are the same in float64."""
    return scale if scale > 40 else math.log(math.expm1(scale))


class _Rest:
    """What need not be computed again while λ is at rest: inside of this context, which may be entered several times.

    strengths: {id of a condition: (condition, strengths)}.
    memory: {name: (λ, what else it was computed from, result)}, also of the times before.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.strengths: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[str, tuple[Tensor, tuple[object, ...], Tensor]] = {}

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.strengths.clear()


class HyperparameterSpace(WideModule):
    """λ ∈ ℝʰ (unconstrained) and σ = softplus(raw_scale) ∈ ℝʰ₊, with the map to constrained values. At least float32.

    Raises ValueError when there is nothing to tune or two hyperparameters have one name.
    """

    by_batch: Tensor | None

    def __init__(self, hyperparameters: Sequence[Hyperparameter]) -> None:
        super().__init__()
        names = [hyperparameter.name for hyperparameter in hyperparameters]
        if not names:
            raise ValueError(
                "there is nothing to tune: no hyperparameter was asked for and none was found; give hparams, [hp.WeightDecay()]"
            )
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two hyperparameters are called {', '.join(map(repr, repeated))}; match each site once")
        self.names: tuple[str, ...] = tuple(names)
        self.hyperparameters = tuple(hyperparameters)
        self.unconstrained = nn.Parameter(torch.tensor([p.unconstrained for p in hyperparameters]))
        self.raw_scale = nn.Parameter(torch.tensor([inverse_softplus(p.scale) for p in hyperparameters]))
        self.bijection = Bijection(hyperparameters)
        self._rest = _Rest()
        by_batch = torch.tensor([p.by_batch for p in hyperparameters])
        self.register_buffer("by_batch", by_batch if by_batch.any() else None, persistent=False)

    def __repr__(self) -> str:
        """A line for each hyperparameter: where it starts and why, and its range."""
        lines = [f"{p.name}: start {p.init:g} ({p.origin}), in [{p.low:g}, {p.high:g}]" for p in self.hyperparameters]
        return "\n".join([f"{type(self).__name__}(", *(f"  {line}" for line in lines), ")"])

    def __len__(self) -> int:
        return len(self.names)

    @property
    def scale(self) -> Tensor:
        """σ, (h,), positive, differentiable in raw_scale."""
        return F.softplus(self.raw_scale)

    def forward(self, condition: Tensor | None = None) -> Tensor:
        """Constrained strengths at λ₀ + condition: (h,) for condition None or (h,), (batch, h) for (batch, h).

        They have no gradient to λ: in the training objectives λ is a constant (paper, Alg. 1).
        """
        if torch.compiler.is_compiling() or not self._rest.depth:
            return self._strengths(condition)
        if condition is None:
            return self._resting("strengths", partial(self._strengths, None))
        known = self._rest.strengths
        if id(condition) not in known:
            known[id(condition)] = condition, self._strengths(condition)
        return known[id(condition)][1]

    def _strengths(self, condition: Tensor | None) -> Tensor:
        unconstrained = self.unconstrained.detach()
        return self.bijection(unconstrained if condition is None else unconstrained + condition)

    def _resting(self, name: str, compute: Callable[[], Tensor], *settings: object) -> Tensor:
        """What depends on λ and on some settings, from the last time while both are the same."""
        x = self.unconstrained
        if torch.compiler.is_compiling() or not self._rest.depth or x.is_inference():
            return compute()
        key = (x._version, x.dtype, x.device, torch.is_inference_mode_enabled(), *settings)
        before = self._rest.memory.get(name)
        if before is None or before[0] is not x or before[1] != key:
            before = self._rest.memory[name] = x, key, compute()
        return before[2]

    def forget(self) -> None:
        """Compute anew what depends on λ: somebody may have written into its `.data`, which torch does not count."""
        self._rest.memory.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_rest": _Rest()}  # a copy counts its own changes

    def at_rest(self) -> AbstractContextManager[object]:
        """Inside, λ does not move. The strengths at one and the same condition are computed once, those at λ itself only when λ
        has moved since the last time."""
        return self._rest

    def values(self) -> dict[str, float]:
        """name → constrained value at λ₀, inside its range also where float32 rounds beyond an end."""
        pairs = zip(self.hyperparameters, self().tolist(), strict=True)
        return {number.name: min(max(value, number.low), number.high) for number, value in pairs}

    @torch.no_grad()
    def set(self, values: dict[str, float]) -> None:
        """Put λ₀ where these constrained values are; others stay.

        A value that is no integer is moved inside its range, by 1e-6 of the width at either end (`Hyperparameter.inside`).
        Raises ValueError for a name that is not tuned, or a value outside its range, TypeError for one that is no number; then
        all stay.
        """
        points: dict[int, float] = {}
        indices = {name: index for index, name in enumerate(self.names)}
        for name, value in values.items():
            if name not in indices:
                raise ValueError(f"there is no hyperparameter {name!r}; there are {', '.join(self.names)}")
            if not is_number(value):
                raise TypeError(f"{name}={value!r} must be a number within its range")
            hyperparameter = self.hyperparameters[indices[name]]
            low, high = hyperparameter.low, hyperparameter.high
            if not low <= value <= high or math.isinf(value):
                raise ValueError(f"{name}={value} is outside its range [{low}, {high}]; give one inside")
            inside = value if hyperparameter.integer else hyperparameter.inside(value)
            points[indices[name]] = hyperparameter.unconstrained_at(inside)
        for index, point in points.items():
            self.unconstrained[index] = point

    def checked(self, perturbation: Tensor, name: str, inputs: object = None) -> Tensor:
        """A perturbation of λ: one for the batch, (h,), or one per example, (batch, h). Raises ValueError for another shape.

        name: how messages call it.
        inputs: the batch; None where it is not known.
        """
        h, known = len(self), isinstance(perturbation, Tensor)
        if not known or perturbation.dim() not in (1, 2) or perturbation.shape[-1] != h:
            got = tuple(perturbation.shape) if known else type(perturbation).__name__
            raise ValueError(f"{name} must have shape ({h},) or (batch, {h}), one entry per hyperparameter; got {got}")
        if perturbation.dim() == 2 and inputs is not None and len(perturbation) != batch_size(inputs):
            raise ValueError(f"{name} has {len(perturbation)} rows for a batch of {batch_size(inputs)} examples")
        return perturbation

    def named(self, strengths: Tensor) -> dict[str, Tensor]:
        """name → column of a matrix of strengths (..., h): what a loss function receives as `hparams`."""
        return dict(zip(self.names, strengths.unbind(-1), strict=True))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n perturbations ε ~ N(0, diag σ²), (n, h), differentiable in σ (paper, Sec. 2.2).

        generator: on the device of σ. None: torch's own.

        All rows have the same value where a hyperparameter has one strength for all examples.
        """
        device, dtype = self.raw_scale.device, self.raw_scale.dtype
        noise = torch.randn(n, len(self), device=device, dtype=dtype, generator=generator)
        if self.by_batch is not None:
            noise = torch.where(self.by_batch, noise[:1], noise)
        return self.scale * noise

    def draw_alike(self, indices: Iterable[int]) -> None:
        """Give all examples of a batch the same perturbation of the hyperparameters at these indices, from now on."""
        alike = torch.zeros(len(self), dtype=torch.bool) if self.by_batch is None else self.by_batch.cpu()
        alike = alike.index_fill(0, torch.tensor(sorted(indices), dtype=torch.long), True)
        self.by_batch = alike.to(self.raw_scale.device) if alike.any() else None

    def widening(self, most: float) -> Tensor:
        """Factors of σ, (h,), that perturb the constrained value about equally wherever λ is in its range.

        They are ¼ / s(1 − s) for λ at share s of its range: 1 in the middle, more near the ends.
        most: largest factor, ≥ 1.
        """

        def factors() -> Tensor:
            share = self.bijection.position(self.unconstrained.detach())
            return (0.25 / (share * (1 - share))).clamp(max=most)

        return self._resting("widening", factors, most)

    def entropy(self) -> Tensor:
        """H[ε] of the perturbation, Σ ½ log(2πe σ²), a scalar (paper, Eq. 2.7)."""
        return (0.5 * math.log(2 * math.pi * math.e) + self.scale.log()).sum()

    def entropy_terms(self, weight: float) -> list[Tensor]:
        """−τ H[ε] for the weight τ ≥ 0, as a list of penalties; none where τ is 0."""
        return [-weight * self.entropy()] if weight else []
