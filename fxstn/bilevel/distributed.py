"""One run on several processes (torchrun): means, sums and messages between them. In a single process, nothing happens.

Each process has the whole network and its share of the examples. DistributedDataParallel does the same, but synchronises the
gradients of one `forward`, and here are three objectives. Gradients are averaged before an optimizer steps, so that w₀, Θ, λ
and σ stay the same everywhere. A step costs one all-reduce of a number per parameter (docs/guides/distributed.md).

All processes must call every function but `rank` and `processes`: a process that calls one waits for the others.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

T = TypeVar("T")
APART = 1_000_003  # between the seeds of two processes; a prime, so that runs with seeds 0, 1, 2, … share no noise


def processes() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def _messages(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors by type and device: one message holds one kind."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


@torch.no_grad()
def average(tensors: Iterable[Tensor], constants: bool = False) -> None:
    """Replace each tensor by its mean over the processes.

    constants: whether numbers that are the same in all processes stay as they are, bit for bit.
    """
    if processes() == 1:
        return
    for group in _messages(tensors):
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


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], count: Tensor | float | None = None) -> None:
    """Replace each gradient by its mean over the processes. Several processes: all must call it.

    parameters: of the optimizer that steps next.
    count: what the loss of this process is a mean over, such as the number of its examples. None: the same in all processes.

    In a loop of your own, call it between `.backward()` and the step; with a GradScaler before `unscale_`, so that an overflow
    in one process is one in all. Gradients of mean losses become those of the mean over all batches. A parameter without a
    gradient counts as zero: another process may have one. A sparse gradient is sent as a dense one, and then is sparse again:
    it has the rows that are not zero.
    """
    if processes() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad.to_dense() for x in trained]
    if count is not None and gradients:
        own = torch.as_tensor(count, dtype=torch.float64, device=gradients[0].device)
        dist.all_reduce(everything := own.clone())
        for gradient in gradients:
            gradient *= processes() * own / everything.clamp(min=torch.finfo(torch.float64).tiny)
    average(gradients)
    for parameter, mean in zip(trained, gradients, strict=True):
        sparse = parameter.grad is not None and parameter.grad.is_sparse
        parameter.grad = _sparse_rows(mean) if sparse else mean


def _sparse_rows(dense: Tensor) -> Tensor:
    """A dense gradient as a sparse one, of its rows that are not zero."""
    rows = dense.flatten(1).any(1).nonzero().flatten()
    return torch.sparse_coo_tensor(rows[None], dense[rows], dense.shape, is_coalesced=True)


def total(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """{name: sum over the processes}. All processes must have the same names."""
    if processes() == 1 or not values:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """{name: mean over the processes}. All processes must have the same names."""
    return {name: value / processes() for name, value in total(values, device).items()}


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true in any process."""
    return total({"flag": float(flag)}, device)["flag"] > 0


def gather(value: T) -> list[T]:
    """The values of all processes, in each; tensors are on the CPU, because another process may not see the device."""
    if processes() == 1:
        return [value]
    values = [value] * processes()
    dist.all_gather_object(values, tree_map_only(Tensor, Tensor.cpu, value))
    return values


def _can_be_sent(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever an error's own constructor may ask for
        return False


def in_first_process(function: Callable[[], T]) -> T:
    """Run a function in the first process only; all processes return what it returns, or raise what it raises.

    It is for files, which only the first process reads and writes.
    """
    if processes() == 1:
        return function()
    outcome: list[object] = [None, None]  # value, error
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, 0)
    result, fault = outcome
    if isinstance(fault, Exception):
        raise fault
    return cast(T, result)


def lengths_differ(loader: Iterable[object]) -> bool:
    """Whether the loader of one process may end before that of another."""
    length: int | None = None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        length = len(loader)
    lengths = gather(length)
    return len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1)


def seed_apart(number: int = 0) -> None:
    """Give every process but the first noise of its own.

    number: another one for each call in a run.
    """
    if rank():
        torch.manual_seed((torch.initial_seed() + APART * rank() + number) % 2**63)


def common_seed() -> int:
    """The seed of torch's generator in the first process, for all."""
    return in_first_process(torch.initial_seed)


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the tensors of the first."""
    for tensor in tensors if processes() > 1 else ():
        dist.broadcast(values := tensor.contiguous(), 0)
        tensor.copy_(values)


def join(module: nn.Module, device: torch.device, settings: dict[str, object]) -> None:
    """Begin alike: all processes get the parameters and buffers of the first, and each its own noise.

    settings: that must be the same in all processes.

    Raises ValueError, in all processes, where settings or shapes of parameters differ, or where the backend does not reach the
    device.
    """
    if processes() == 1:
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where messages of objects go
    if dist.get_backend() == "nccl" and device.type != "cuda":
        raise ValueError(f"the process group's backend is nccl, which needs CUDA, and the runner's device is {device}: give "
                         'device=f"cuda:{local_rank}", or init_process_group("gloo")')  # fmt: skip
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    texts = {name: repr(value) for name, value in settings.items()}
    texts |= {name: f"{tuple(tensor.shape)}, {tensor.dtype}" for name, tensor in tensors.items()}
    first, *others = gather(texts)
    for number, other in enumerate(others, 1):
        if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            name = differing[0]
            raise ValueError(f"the processes do not run the same: {name} is {first.get(name, 'missing')} in process 0 and "
                             f"{other.get(name, 'missing')} in process {number}")  # fmt: skip
    share(tensors.values())
    seed_apart()
