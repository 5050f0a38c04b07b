"""One run on several processes (torchrun): what they agree on. Every function does nothing in a process of its own.

Each process has the whole network and its share of the examples, as with DistributedDataParallel, which synchronises only
`forward`; here three objectives have gradients of their own. They are averaged where an optimizer is about to step, so that w₀,
Θ, λ and σ stay the same everywhere. Communication per step: one all-reduce of as many numbers as that step's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; all must hold gradients for the same parameters.

    For loops of one's own: call it between `.backward()` and the optimizer's step. Gradients of mean losses over batches of
    one size become those of the mean over all of them.
    """
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for kind in dict.fromkeys((g.dtype, g.device) for g in gradients):
        group = [g for g in gradients if (g.dtype, g.device) == kind]
        flat = torch.cat([g.reshape(-1) for g in group])
        dist.all_reduce(flat)
        for gradient, mean in zip(group, (flat / processes()).split([g.numel() for g in group]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def total(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over the processes, which must have the same names."""
    if processes() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    return {name: value / processes() for name, value in total(values, device).items()}


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return total({"flag": float(flag)}, device)["flag"] > 0


@torch.no_grad()
def spread(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, so that all begin alike."""
    if processes() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


def gathered(value: Any) -> list[Any]:
    """The value of every process, in each."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


def of_first(make: Callable[[], Any]) -> Any:
    """What `make` returns, or raises, in the first process: for files, which only that one reads."""
    if processes() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
