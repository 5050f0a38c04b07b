"""One run on several processes (torchrun): what they agree on. Every function does nothing in a process of its own.

Each process has the whole network and its share of the examples, as with DistributedDataParallel, which synchronises only
`forward`; here three objectives have gradients of their own. They are averaged where an optimizer is about to step, so that w₀,
Θ, λ and σ stay the same everywhere. Communication per step: one all-reduce of as many numbers as that step's parameters
(docs/distributed.md).

Every function here but `rank` and `processes` must be called by all processes, or those that do wait for the others.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

APART = 1_000_003  # between the seeds of two processes; a prime, so that runs with seeds 0, 1, 2, … share no noise


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


def _kinds(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by type and device, which one message can hold."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(found.values())


@torch.no_grad()
def average(tensors: Iterable[Tensor], constants: bool = False) -> None:
    """Replace each tensor by its mean over the processes. constants: numbers that agree stay, bit for bit."""
    if processes() == 1:
        return
    for group in _kinds(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        means = flat.clone() if constants else flat
        dist.all_reduce(means)
        means /= processes()
        if constants:
            dist.broadcast(first := flat.clone(), 0)
            dist.all_reduce(differing := (flat != first).to(flat.dtype))
            means = torch.where(differing == 0, flat, means)
        for tensor, mean in zip(group, means.split([t.numel() for t in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes. Several processes: all must call it.

    For loops of one's own: call it between `.backward()` and the optimizer's step, with that optimizer's parameters. Gradients
    of mean losses over batches of one size become those of the mean over all of them. A parameter without a gradient counts
    as zero, as another process may have one.
    """
    if processes() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average(parameter.grad for parameter in trained if parameter.grad is not None)


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


def gathered(value: Any) -> list[Any]:
    """The value of every process, in each; tensors on the CPU, as another process may not see the device."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, tree_map_only(Tensor, Tensor.cpu, value))
    return found


def _can_be_sent(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever an error's own constructor may ask for
        return False


def of_first(make: Callable[[], Any]) -> Any:
    """What `make` returns, or raises, in the first process: for files, which only that one reads and writes."""
    if processes() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def uneven(loader: Any) -> bool:
    """Whether one process's loader may end before another's."""
    sized = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    lengths = gathered(len(loader) if sized else None)
    return len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1)


def seed_apart(number: int = 0) -> None:
    """Give every process but the first noise of its own; number: another one for each time it is asked for in a run."""
    if rank():
        torch.manual_seed((torch.initial_seed() + APART * rank() + number) % 2**63)


def join(module: nn.Module, device: torch.device, settings: dict[str, Any]) -> None:
    """Begin alike: the first process's parameters and buffers everywhere; noise of its own in each.

    Raises ValueError, in all processes, where their settings or the shapes of their parameters differ, or where the backend
    does not reach the device.
    """
    if processes() == 1:
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where messages of objects go
    if dist.get_backend() == "nccl" and device.type != "cuda":
        raise ValueError(f"the process group's backend is nccl, which needs CUDA, and the runner's device is {device}: give "
                         'device=f"cuda:{local_rank}", or init_process_group("gloo")')  # fmt: skip
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    told = {name: repr(value) for name, value in settings.items()}
    told |= {name: f"{tuple(tensor.shape)}, {tensor.dtype}" for name, tensor in tensors.items()}
    first, *others = gathered(told)
    for number, other in enumerate(others, 1):
        if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            name = differing[0]
            raise ValueError(f"the processes do not run the same: {name} is {first.get(name, 'missing')} in process 0 and "
                             f"{other.get(name, 'missing')} in process {number}")  # fmt: skip
    with torch.no_grad():
        for tensor in tensors.values():
            dist.broadcast(begun := tensor.contiguous(), 0)
            tensor.copy_(begun)
    seed_apart()
