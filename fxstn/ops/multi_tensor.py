"""Operations on many tensors at once that torch's own multi-tensor functions do not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

_HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_FUSED = {"cuda": _HALF_OR_SINGLE, "cpu": (*_HALF_OR_SINGLE, torch.float64)}  # on CUDA the rate is in float32
_KINDS = attrgetter("device"), attrgetter("dtype"), attrgetter("layout")


def add_multiples(tensors: Sequence[Tensor], directions: Sequence[Tensor], factor: Tensor) -> None:
    """x += factor d for each x of several tensors, in one pass over the two.

    tensors, directions: x and d, of equal shapes, all of one type.
    factor: 0-d, on their device; its value is not waited for.

    It is one kernel for many tensors, that of torch's fused SGD: a step of ascent along d, whose rate may be on the device.
    `torch._foreach_add_` takes the factor from the host only.
    """
    if torch.compiler.is_compiling() or not _fusible([*tensors, *directions], len(tensors)):
        factor = factor.to(tensors[0].dtype)
        for x, direction in zip(tensors, directions, strict=True):
            x.addcmul_(direction, factor)
        return
    read = [direction.data for direction in directions]  # torch counts a write to what the kernel only reads
    rate = factor.float() if factor.is_cuda else factor
    torch._fused_sgd_(
        list(tensors), read, [], weight_decay=0.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
        maximize=True, is_first_step=False,
    )  # fmt: skip


def _fusible(tensors: Sequence[Tensor], half: int) -> bool:
    """Whether the kernel takes tensors, each of the first half with its partner in the second."""
    devices, dtypes, layouts = (set(map(get, tensors)) for get in _KINDS)  # in every step: without a loop of Python's
    device, dtype = next(iter(devices)), next(iter(dtypes))
    if len(devices) + len(dtypes) > 2 or layouts != {torch.strided} or dtype not in _FUSED.get(device.type, ()):
        return False
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    pairs = zip(tensors[:half], tensors[half:], strict=True)
    return all(_are_contiguous(x, d) or (x.stride() == d.stride() and _is_dense(x)) for x, d in pairs)


def _are_contiguous(x: Tensor, d: Tensor) -> bool:
    return x.is_contiguous() and d.is_contiguous()


def _is_dense(x: Tensor) -> bool:
    """Whether the entries lie next to each other, in whatever order."""
    return not x.numel() or x.numel() == 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """torch's clip_grad_norm_, which older versions of torch lack for sparse gradients.

    most: > 0, the Euclidean norm of all gradients together above which they are scaled down to it.
    """
    parameters = list(parameters)
    if not any(w.grad is not None and w.grad.is_sparse for w in parameters):
        nn.utils.clip_grad_norm_(parameters, most)
        return
    entries = []
    for weight in parameters:
        if weight.grad is not None and weight.grad.is_sparse:
            weight.grad = weight.grad.coalesce()
        if weight.grad is not None:
            entries.append(weight.grad._values() if weight.grad.is_sparse else weight.grad)
    factor = (most / (nn.utils.get_total_norm(entries) + 1e-6)).clamp(max=1.0)
    for values in entries:
        values.mul_(factor.to(values.device))
