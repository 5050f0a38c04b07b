"""The loss of one batch, and what it is a mean over: several batches, and padding, then count as one batch of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxstn.ir.input_errors import is_number
from fxstn.ir.staging import in_graph
from fxstn.ops.batch_axis import batch_size
from fxstn.ops.precision import widen

Count = Tensor | float
IGNORED = -100  # the class that torch's losses leave out of their mean by default
_MEAN, _SUM = 1, 2  # values of `reduction` in torch's kernels
_HALF = (torch.float16, torch.bfloat16)  # which count to 2048, or to 256


@dataclass(frozen=True)
class Mean:
    """A mean, and what it divides by. Its value means nothing where that is 0 (`without_empty`)."""

    value: Tensor
    count: Count

    def copy(self) -> Mean:
        """The same in memory of its own: the next run of a compiled graph writes over the results of the last one."""
        value, count = self.value, self.count
        if not isinstance(count, Tensor):
            return Mean(value.clone(), count)
        if value.dtype == count.dtype:  # one kernel
            return Mean(*torch.stack((value, count)).unbind())
        return Mean(value.clone(), count.clone())


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    data: what the loss function returned, a scalar: a mean over the batch, or a sum.
    count: what the mean divides by, such as the number of target entries that are not ignored. 1 for a sum.
    additive: whether data is a sum, so that the sums of several batches add up.
    penalties: what is minimised besides; they do not grow with the batch.
    entries: the number of target entries that are not ignored, whatever weights they have.
    """

    data: Tensor
    count: Count
    entries: Count
    additive: bool | Tensor = False
    penalties: tuple[Tensor | float, ...] = ()

    def total(self, parts: int = 1) -> Tensor:
        """The scalar to minimise.

        parts: the number of batches whose totals one step averages. A sum becomes the sum over all of them.
        """
        total = either(self.additive, self.data * parts, self.data) if parts > 1 else self.data
        for penalty in self.penalties:
            total = total + penalty
        return total

    def with_penalties(self, *penalties: Tensor | float) -> Loss:
        """The same loss with further penalties."""
        return replace(self, penalties=(*self.penalties, *penalties))

    def __mul__(self, factor: Tensor | float) -> Loss:
        """The loss times a number, with its penalties."""
        return replace(self, data=self.data * factor, penalties=tuple(penalty * factor for penalty in self.penalties))

    def detach(self) -> Loss:
        """The same numbers without autograd's record of them."""
        count = self.count.detach() if isinstance(self.count, Tensor) else self.count
        return replace(self, data=self.data.detach(), count=count)


LossValue = Loss | Tensor | tuple[Tensor, Count]  # a scalar, the mean over the batch, or (sum, count)


def either(condition: bool | Tensor, value: Any, other: Any) -> Any:
    """`value` where a condition holds, else `other`; a condition that is a tensor is not waited for."""
    return torch.where(condition, value, other) if isinstance(condition, Tensor) else value if condition else other


def positive(count: Count) -> Count:
    """The count, or 1 where it is zero: what to divide by."""
    return torch.where(count > 0, count, torch.ones_like(count)) if isinstance(count, Tensor) else count or 1.0


def without_empty(value: Tensor, count: Count) -> Tensor:
    """The value, or 0 where it is a mean over nothing, which torch calls NaN."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, value, torch.zeros_like(value))
    return value if count else torch.zeros_like(value)


def sum_of_means(means: Sequence[Mean], unit: Count) -> tuple[Tensor, Count]:
    """(sum of value · count / unit, sum of count / unit), in a few kernels."""
    values = [mean.value for mean in means]
    if any(isinstance(mean.count, Tensor) for mean in means):
        counts = torch.stack([torch.as_tensor(mean.count, device=values[0].device) for mean in means])
        shares = counts / unit
        return (without_empty(widen(torch.stack(values)), counts) * shares).sum(), shares.sum()
    numbers = [float(mean.count) / float(unit) for mean in means]
    parts = [widen(value) for value, number in zip(values, numbers, strict=True) if number]
    scaled = (
        torch._foreach_mul(parts, [number for number in numbers if number]) if parts else [torch.zeros_like(values[0])]
    )
    return torch.stack(list(scaled)).sum(), sum(numbers)


def entries(inputs: object, target: object) -> Count:
    """The number of the target's entries that are not -100, one per example or per time of an example.

    Where the target is no tensor, or has no entries, the number of examples.
    """
    if not isinstance(target, Tensor) or not target.dim():
        return _size(batch_size(inputs))
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        return _size(target.numel())
    return (target != IGNORED).sum()


def as_loss(value: object, inputs: object, target: object, name: str = "loss_fn") -> Loss:
    """The loss of a batch, from what a loss function returned: a scalar, the mean over the batch, or (sum, count).

    name: of the function, for errors.

    The count of a scalar comes from autograd's record of the operation that made it: `F.cross_entropy` with its weights and
    ignored class, `losses.mean()`, `losses.sum() / count`, also inside of a function of the user's own. Where there is no such
    record it is that of `entries`. Raises ValueError for anything else.
    """
    if isinstance(value, Loss):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        total, count = value
        if _is_scalar(total) and (is_number(count) or _is_scalar(count)):
            count = (
                count.detach().clone() if isinstance(count, Tensor) else float(count)
            )  # the caller may count on in it
            return Loss(total / positive(count), count, entries(inputs, target))
    if not isinstance(value, Tensor) or value.dim():
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must return a scalar tensor, the mean over the batch; got {kind}: give losses.mean() or (sum, count)"
        )
    number = partial(entries, inputs, target)
    if torch.compiler.is_compiling():
        return Loss(value, *_counts_in_graph(value, _as_tensor(number(), value)))
    return Loss(value, *_counts(value, number))


def _counts(loss: Tensor, number: Callable[[], Count]) -> tuple[Count, Count, bool]:
    """(count, entries, additive) of a loss, from autograd's record of it.

    number: the entries of the target, where there is no such record.
    """
    reductions = list(_reductions(loss))
    first = next((each for each in reductions if each.native), reductions[0] if reductions else None)
    own = number() if first is None or first.entries is None else first.entries
    if first is None or first.additive:
        return own if first is None else 1.0, own, first is not None
    more = [each.count for each in reductions if each is not first and each.kind == first.kind and not each.additive]
    count = sum(more, first.count)
    if first.kind.startswith("Div") and isinstance(there := number(), Tensor):
        count = torch.where(there > 0, count, 0.0)  # the user's divisor may be kept from 0, where all is padding
    return count, own, False


@in_graph
def _counts_in_graph(loss: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_counts` as tensors, of a loss that torch.compile follows: while it does, there is autograd's record."""
    count, own, additive = _counts(loss, lambda: number)
    return _as_tensor(count, loss), _as_tensor(own, loss), _as_tensor(additive, loss)


def _as_tensor(value: Count, like: Tensor) -> Tensor:
    """A number as a tensor of its own; a size that may change stays one."""
    return value.clone() if isinstance(value, Tensor) else torch.full((), value, device=like.device)


def _as_operand(divisor: Count) -> Count:
    """A divisor as autograd has saved it. torch.compile's stand-in for a plain number can only be a second operand."""
    if not isinstance(divisor, Tensor) or not torch.compiler.is_compiling():
        return divisor
    return torch.ones((), dtype=divisor.dtype, device=divisor.device) * divisor


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and not value.dim()


@dataclass(frozen=True)
class _Reduction:
    """An operation that made one number of many.

    native: whether it is one of torch's losses, and no mean or sum of the user's own.
    entries: the number of target entries that it does not ignore; None where its record does not say.
    """

    kind: str
    native: bool
    count: Count = 1.0
    entries: Count | None = None
    additive: bool = False


def _reductions(loss: Tensor) -> Iterator[_Reduction]:
    """Those that a loss is made of, from the first operand on. A loss is a mean or sum, or a combination of such numbers."""
    nodes: list[tuple[Any, bool]] = [(loss.grad_fn, False)]  # operations, and whether a factor follows them
    visits = set()
    while nodes:
        node, scaled = nodes.pop()
        if node is None or node in visits:
            continue
        visits.add(node)
        reduction = _reduction(node, scaled)
        if reduction is not None:
            yield reduction
            continue
        scaled = scaled or node.name().startswith(("MulBackward0", "Div"))  # MulBackward1: within a loss of torch
        operands = [operand for operand, _ in node.next_functions if _is_number(operand)]
        nodes += [(operand, scaled) for operand in reversed(operands)]


def _is_number(node: Any) -> bool:
    """Whether an operation's result is a single number, or a stack of such numbers."""
    results = node._input_metadata if node is not None else []
    if not results or not (shape := tuple(results[0].shape)):
        return bool(results)
    return len(shape) == 1 and node.name().startswith("Stack") and all(_is_number(n) for n, _ in node.next_functions)


def _reduction(node: Any, scaled: bool) -> _Reduction | None:
    """What an operation reduces; None where it is no reduction, or a sum that is scaled by who knows what."""
    kind = node.name()
    operand = node.next_functions[0][0] if node.next_functions else None
    if hasattr(node, "_saved_reduction") and node._saved_reduction in (_MEAN, _SUM):
        additive = node._saved_reduction == _SUM
        if additive and scaled:
            return None
        count, number = _native_counts(node)
        return _Reduction(kind, True, count, number, additive)
    if operand is None or _is_number(operand):
        if kind.startswith("Div") and _is_sum(operand) and _is_known(node._saved_other):
            divisor = _as_operand(node._saved_other)
            node.register_hook(partial(_gradient_unless_empty, divisor))
            return _Reduction(kind, False, divisor, divisor)
        return None
    if kind.startswith("Mean"):
        return _Reduction(kind, False, _size(node._saved_self_sym_numel))
    if kind.startswith("Sum") and not scaled and not operand.name().startswith(("Mean", "Div")):
        return _Reduction(kind, False, additive=True)
    return None


def _gradient_unless_empty(count: Count, gradients: tuple, _: tuple) -> tuple:
    """The gradients that a division by a count returns, or zero where it divides by zero; torch's own losses do the same."""
    return tuple(gradient if gradient is None else without_empty(gradient, count) for gradient in gradients)


def _is_sum(node: Any) -> bool:
    """Whether an operation sums many numbers up, perhaps with another sign."""
    if node is not None and node.name().startswith("Neg"):
        return _is_sum(node.next_functions[0][0])
    many = node is not None and bool(node.next_functions) and not _is_number(node.next_functions[0][0])
    return many and (node.name().startswith("Sum") or getattr(node, "_saved_reduction", None) == _SUM)


def _is_known(divisor: Any) -> bool:
    """Whether a divisor is a plain number, which depends on no parameter."""
    return isinstance(divisor, (int, float)) or (_is_scalar(divisor) and not divisor.requires_grad)


def _native_counts(node: Any) -> tuple[Count, Count]:
    """What the mean of a loss of torch divides by, and the number of target entries that it does not ignore."""
    if not hasattr(node, "_saved_ignore_index"):
        number = _size(node._saved_self.numel())
        return number, number
    weight, total, target = node._saved_weight, node._saved_total_weight, node._saved_target
    if weight is None and node._saved_reduction == _MEAN and total.dtype not in _HALF:
        return total, total
    mask = target != _signed(node._saved_ignore_index)
    if weight is None:
        return mask.sum(), mask.sum()
    return (weight.float()[target[mask]].sum() if total.dtype in _HALF else total), mask.sum()


def _size(number: int | torch.SymInt) -> Any:
    """A size as a count. It stays one in a graph that is compiled for changing sizes."""
    return number if torch.compiler.is_compiling() or not isinstance(number, int) else float(number)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
