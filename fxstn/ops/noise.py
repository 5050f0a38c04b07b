"""λ-conditioned noise. Each draw is one node of the graph, shared by primal and tangent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx

from fxstn.ir.staging import staged
from fxstn.ir.tangents import BATCH_FIRST, BatchAxis, Owners, Place
from fxstn.ops.batch_axis import expand_rows, row_numbers, with_mean
from fxstn.ops.precision import wide


def by_example(strength: Tensor | float, x: Tensor) -> Tensor:
    """A strength, or (batch,) of them, as (batch or 1, 1, ..., 1): it broadcasts with x (batch, ...). At least float32."""
    dtype = wide(x.dtype) if x.is_floating_point() else torch.float32
    if not isinstance(strength, Tensor):
        return x.new_full([1] * x.dim(), strength, dtype=dtype)
    return strength.to(x.device, dtype).reshape(-1, *[1] * (x.dim() - 1))


def uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One draw per example of x (batch, ...) from [low, high): (batch, 1, ..., 1)."""
    dtype = wide(x.dtype) if x.is_floating_point() else torch.float32
    noise = torch.rand((x.shape[0], *[1] * (x.dim() - 1)), device=x.device, dtype=dtype)
    return noise if (low, high) == (0, 1) else low + (high - low) * noise


@staged
def keep_rates(p: Tensor) -> Tensor:
    """1 − p, above 0: the share of what dropout at rate p keeps, of all rates in a few kernels.

    p: of any shape; what is not a number drops everything.

    The result stays with p, for the next call: strengths of a λ that rests are one and the same tensor.
    """
    if torch.compiler.is_compiling() or p.requires_grad or p.is_inference():
        return _keep_rates(p)
    version, result = vars(p).get("keep_rates", (None, None))
    if result is None or version != p._version:
        result = _keep_rates(p)
        vars(p)["keep_rates"] = p._version, result
    return result


def _keep_rates(p: Tensor) -> Tensor:
    return (1 - p).nan_to_num_(0.0).clamp_min_(torch.finfo(p.dtype).tiny)


class Strengths:
    """What random operations of a model read.

    values: (h,), of λ; whoever moves λ writes into it.

    `calls` counts the calls of modules in the forward under way, where these have strengths of their own. `modules` are the ids
    of those that the model holds, from its first forward on.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.calls: Counter[int] = Counter()
        self.modules: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        return {"values": self.values, "calls": Counter(), "modules": set()}  # a copy has other modules

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]

    def keep_rate(self, index: int) -> Tensor | None:
        """1 − p of a rate, computed for all of them when λ has moved; None where torch.compile looks on."""
        return None if torch.compiler.is_compiling() else keep_rates(self.values)[index]


@staged(random=True)
def dropout_mask(
    x: Tensor,
    p: Tensor | float,
    spatial: int = 0,
    batch_axis: Place = BATCH_FIRST,
    keep_rate: Tensor | None = None,
) -> Tensor | int:
    """Multiplier of inverted dropout: 0 with probability p, else 1/(1 − p).

    x: what will be multiplied.
    p: in [0, 1]; a number, a 0-d tensor, or (batch,) with one rate per example.
    spatial: 0 for one draw per element; k for one per channel of a value with k dimensions after it; -1 for one per channel,
        which is dimension 1.
    batch_axis: where the examples are in x.
    keep_rate: `keep_rates(p)`, where a graph has it; None: it is computed here.

    Returns a tensor that broadcasts with x, or 1 where there is nothing to drop: in indices, in a single number such as a loss.
    Raises ValueError when p has a rate per example but x has another number of examples.
    """
    if not x.is_floating_point() or not x.dim():
        return 1
    return _inverted(x, _mask_shape(x, spatial), p, batch_axis, keep_rate)


def _mask_shape(x: Tensor, spatial: int) -> tuple[int, ...]:
    leading = x.dim() if not spatial else max(1, min(2, x.dim() - spatial))  # (channels, ...) is an unbatched value
    return x.shape[:leading] + (1,) * (x.dim() - leading)


def _inverted(
    x: Tensor, shape: Sequence[int], p: Tensor | float, batch_axis: Place, keep_rate: Tensor | None = None
) -> Tensor:
    """One draw of 0 or 1/(1 − p) for each entry of a shape that broadcasts with x."""
    keep: Tensor | float = max(1 - p, torch.finfo(wide(x.dtype)).tiny) if not isinstance(p, Tensor) else 0.0
    if isinstance(p, Tensor):
        p = _by_example(p.to(wide(x.dtype)), x, batch_axis)
        keep = keep_rates(p) if keep_rate is None else _by_example(keep_rate.to(p.dtype), x, batch_axis)
    if _is_serial(x):
        return torch.rand(shape, device=x.device, dtype=wide(x.dtype)).ge_(p).div_(keep).to(x.dtype)
    left = torch.empty(shape, device=x.device, dtype=torch.bool).bernoulli_(keep)  # a byte for each entry
    rate = keep.detach() if isinstance(keep, Tensor) else keep
    return torch.div(left, rate, out=torch.empty(shape, device=x.device, dtype=x.dtype))


def _is_serial(x: Tensor) -> bool:
    """Whether `bernoulli_` is slow: the CPU draws one number after the other, and torch.compile fuses `rand` alone."""
    return x.device.type == "cpu" or torch.compiler.is_compiling()


def _by_example(p: Tensor, x: Tensor, batch_axis: Place) -> Tensor:
    """A rate, or one per example, so that it broadcasts with x."""
    if not p.dim():
        return p
    if isinstance(batch_axis, Owners):
        return with_mean(p)[row_numbers(batch_axis, len(p))]
    return expand_rows(p, x, batch_axis).view([-1 if i == batch_axis.axis else 1 for i in range(x.dim())])


def locked_mask(x: Tensor, p: Tensor | float, axis: int, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor | int:
    """Multiplier of variational dropout: one draw for all times (Gal & Ghahramani 2016, arXiv 1512.05287).

    x, p, batch_axis: as in `dropout_mask`.
    axis: dimension of x that is time.

    Returns a tensor shaped like x, but 1 along `axis`; or 1 where x is not floating point. Raises ValueError where x has no
    such axis, or its examples there.
    """
    if not x.is_floating_point():
        return 1
    time = axis % x.dim() if -x.dim() <= axis < x.dim() else None
    located = batch_axis != BATCH_FIRST or (isinstance(p, Tensor) and p.dim() > 0)
    if time is None or (located and time == batch_axis.axis):
        raise ValueError(
            f"hp.LockedDropout: axis={axis} cannot be that of time in a value of shape {tuple(x.shape)}"
            + (f", whose examples are along dimension {batch_axis.axis}" if located else "")
            + "; pass axis=1 for (batch, time, ...), axis=0 for (time, batch, ...)"
        )
    return _inverted(x, [1 if i == time else size for i, size in enumerate(x.shape)], p, batch_axis)


def word_mask(index: Tensor, table: Tensor, p: Tensor | float, batch_axis: BatchAxis = BATCH_FIRST) -> Tensor:
    """Multiplier of a lookup whose words are dropped wherever they occur (Gal & Ghahramani 2016): 1[u ≥ p]/(1 − p).

    There is one u per word, a row of the table, for the whole batch.

    index: whole numbers, of any shape.
    table: (words, features).
    p: in [0, 1), as in `dropout_mask`.
    batch_axis: where the examples are in `index`.

    Returns (*index.shape, 1).
    """
    noise = torch.rand(len(table), device=index.device, dtype=wide(table.dtype))
    if isinstance(p, Tensor):
        p = _by_example(p.to(noise.dtype), index, batch_axis)
    return ((noise[index] >= p) / (1 - p)).to(table.dtype).unsqueeze(-1)


@staged(random=True)
def alpha_dropout_coefficients(
    x: Tensor, p: Tensor | float, spatial: int = 0, batch_axis: Place = BATCH_FIRST
) -> tuple[Tensor, Tensor]:
    """(multiplier, shift) of alpha dropout (Klambauer et al. 2017, Sec. "Alpha dropout"): y = x · multiplier + shift.

    Dropped units are set to SELU's lower limit, and the result is rescaled to keep zero mean and unit variance.

    x, spatial, batch_axis: as in `dropout_mask`.
    p: as in `dropout_mask`; a tensor is below 1. At 1 everything is 0, as torch has it.

    Returns two tensors that broadcast with x.
    """
    limit = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
    mask = (_inverted(x, _mask_shape(x, spatial), p, batch_axis) != 0).to(wide(x.dtype))
    if isinstance(p, Tensor):
        p = _by_example(p.to(mask.dtype), x, batch_axis)
    gain = 0.0 if isinstance(p, (int, float)) and p == 1 else ((1 - p) * (1 + p * limit**2)) ** -0.5
    return (mask * gain).to(x.dtype), ((1 - mask) * (gain * limit) - gain * p * limit).to(x.dtype)


@staged(random=True)
def row_mask(x: Tensor, p: Tensor | float, whole: bool = False) -> Tensor:
    """Multiplier of stochastic depth: per example, or for the whole batch, 0 with probability p, else 1/(1 − p).

    x: (batch, ...).
    p: as in `dropout_mask`.
    whole: one draw for the whole batch.

    Returns a tensor that broadcasts with x.
    """
    return _inverted(x, [1 if whole else x.shape[0], *[1] * (x.dim() - 1)], p, BATCH_FIRST)


@staged
def one_for_all_examples(strength: Tensor, condition: Tensor | None, index: int, where: str) -> Tensor:
    """The one strength of all examples, 0-d.

    strength: 0-d, or (batch,) where `condition` has a row per example.
    condition: what the strength is computed from, (batch, h): column `index` has one value in all rows.
    where: what reads the strength, for the message.

    Raises RuntimeError where the rows differ. On CUDA torch raises it at the next synchronisation, so that none is needed
    here.
    """
    if condition is None or condition.dim() < 2:
        return strength
    values = condition[:, index]
    message = f"{where} has one strength for all examples of a batch; give `condition` the same value there in all rows"
    torch._assert_async((values == values[0]).all(), message)
    return strength[0]


def shared_strengths(graph: fx.Graph) -> set[int]:
    """Which λ a graph reads once for all examples."""
    return {cast(int, node.args[2]) for node in graph.nodes if node.target is one_for_all_examples}


@staged(random=True)
def weight_mask(weight: Tensor, p: Tensor) -> Tensor:
    """Multiplier of DropConnect, shaped like the weight: 0 with probability p, else 1/(1 − p), one for the whole batch.

    p: in [0, 1), 0-d.

    Raises ValueError for a rate per example: the examples share the mask.
    """
    if p.dim():
        raise ValueError(f"hp.DropConnect: {len(p)} rates for one mask; give one rate for the whole batch")
    return _inverted(weight, weight.shape, p, BATCH_FIRST)


@staged
def track_batch(num_batches_tracked: Tensor, momentum: float | None) -> float | Tensor:
    """Count one training batch of a batch norm.

    num_batches_tracked: the counter, to which 1 is added.
    momentum: of the norm; None stands for a cumulative average.

    Returns the factor of the running average.
    """
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


@staged
def track_batches(counters: Sequence[Tensor]) -> None:
    """Count one training batch of each of several batch norms, all by one kernel."""
    torch._foreach_add_(list(counters), 1)
