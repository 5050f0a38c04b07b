"""Plain training of a task's network, as a practitioner writes it: no part of fxstn but its augmentations takes part.

The strengths act on ordinary modules and on the optimizer's groups, so that a search may change them between epochs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.worth.tasks import Task

CHUNK = 500  # examples of an evaluation at a time


def joined(*sets: TensorDataset) -> TensorDataset:
    """The examples of all."""
    return TensorDataset(*(torch.cat(parts) for parts in zip(*(one.tensors for one in sets), strict=True)))


class Rows(Dataset):
    """A set of tensors that hands out whole batches."""

    def __init__(self, data: TensorDataset) -> None:
        self.tensors = data.tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        return tuple(tensor[place] for tensor in self.tensors)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[places] for tensor in self.tensors)


def whole(batch: Any) -> Any:
    """What `Rows` hands out is a batch already."""
    return batch


def loader(data: TensorDataset, size: int, seed: int, shuffle: bool = True) -> DataLoader:
    """Batches in an order that the seed decides; a rest of one is left out, as batch norms cannot use it."""
    generator, rest = torch.Generator().manual_seed(seed), len(data) % size
    return DataLoader(Rows(data), size, shuffle, generator=generator, collate_fn=whole, drop_last=shuffle and rest == 1)


def outputs(network: nn.Module, data: TensorDataset) -> Tensor:
    """In eval mode."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in data.tensors[0].split(CHUNK)])


def scores(task: Task, network: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """(loss, metric) of a set."""
    output, target = outputs(network, data), data.tensors[1]
    wrong = (output - target).square() if task.metric == "rmse" else (output.argmax(-1) != target).float()
    metric = wrong.mean().sqrt() if task.metric == "rmse" else 1 - wrong.mean()
    return task.loss(output, target).item(), metric.item()


def decayed(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of linear and convolution layers, all other parameters): weight decay is of the first, as `hp.WeightDecay`'s."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    chosen = {id(layer.weight) for layer in layers}
    both: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in network.parameters():
        both[id(parameter) not in chosen].append(parameter)
    return both


@dataclass(frozen=True)
class Limits:
    """When a run ends: after so many epochs or seconds of the CPU, or so many epochs without a lower validation loss."""

    epochs: int
    seconds: float = math.inf
    patience: int = 10**9


@dataclass
class Plain:
    """A network in training: its weights, optimizer, strengths, time and the best epoch so far.

    seed: of the weights, of the order of batches and of all that is drawn.
    augment: what happens to the images of a batch, before the strengths act; None: nothing.
    optimizer_of: factory of the optimizer of the network; None: the task's, with weight decay where it belongs.
    """

    task: Task
    strengths: Mapping[str, float]
    seed: int
    augment: Callable[[Tensor], Tensor] | None = None
    optimizer_of: Callable[[Task, nn.Module], torch.optim.Optimizer] | None = None
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)
    best: float = math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    batches: DataLoader | None = None
    averages: AveragedModel | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.network = self.task.network()
        if self.optimizer_of is None:
            weights, others = decayed(self.network)
            self.optimizer = self.task.optimizer([{"params": weights}, {"params": others}])
        else:
            self.optimizer = self.optimizer_of(self.task, self.network)
        self.set(self.strengths)

    def set(self, strengths: Mapping[str, float]) -> None:
        """Train on at these strengths. "dropout" is of every dropout module, "PATH.dropout" of one."""
        self.strengths = dict(strengths)
        for name, module in self.network.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = strengths.get(f"{name}.dropout", strengths.get("dropout", 0.0))
        if self.optimizer_of is None:
            weights, others = self.optimizer.param_groups
            weights["weight_decay"] = strengths.get("weight_decay", self.task.own_decay)
            others["weight_decay"] = 0.0 if self.task.decay else weights["weight_decay"]

    def _augmented(self, x: Tensor) -> Tensor:
        x = x if self.augment is None else self.augment(x)
        for operation in self.task.augmentations:
            values = [self.strengths.get(name, 0.0) for name in operation.numbers]
            values = [round(v) if n.integer else v for v, n in zip(values, operation.numbers.values(), strict=True)]
            x = operation.function(x, *values, **operation.defaults) if any(values) else x
        return x

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.task.loss(self.network(self._augmented(x)), y).backward()
        self.optimizer.step()
        if self.averages is not None:
            self.averages.update_parameters(self.network)

    def average(self, steps: int) -> None:
        """From now on, average weights and statistics over so many of the last steps, as a refit of ours does."""
        self.averages = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(1, steps)), use_buffers=True
        )
        self.averages.update_parameters(self.network)

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]], valid: TensorDataset | None) -> None:
        """One pass, and the loss of the validation set. The best weights so far are kept."""
        begun = time.process_time()
        self.network.train()
        for x, y in batches:
            self.step(x, y)
        self.evaluate(valid)
        self.seconds += time.process_time() - begun

    def evaluate(self, valid: TensorDataset | None) -> None:
        """End an epoch."""
        self.curve.append(math.nan if valid is None else scores(self.task, self.network, valid)[0])
        if self.curve[-1] < self.best:
            self.best, self.best_epoch = self.curve[-1], len(self.curve)
            self.best_weights = deepcopy(self.network.state_dict())

    def run(self, train: TensorDataset, valid: TensorDataset | None, limits: Limits) -> Self:
        """Train on until a limit is reached."""
        self.batches = self.batches or loader(train, self.task.batch, self.seed)
        while len(self.curve) < limits.epochs and len(self.curve) - self.best_epoch < limits.patience:
            self.epoch(self.batches, valid)
            if self.seconds >= limits.seconds or (valid is not None and not math.isfinite(self.curve[-1])):
                break
        return self

    def follow(self, other: Plain) -> None:
        """Go on from the weights and the optimizer's state of another run, and from its best epoch."""
        self.network.load_state_dict(other.network.state_dict())
        self.optimizer.load_state_dict(deepcopy(other.optimizer.state_dict()))
        self.curve, self.best, self.best_epoch = list(other.curve), other.best, other.best_epoch
        self.best_weights = other.best_weights

    def best_network(self) -> nn.Module:
        """A copy at the best epoch; as it is, or its averages, where no validation set was seen."""
        network = deepcopy(self.network if self.averages is None else self.averages.module)
        if self.best_weights:
            network.load_state_dict(self.best_weights)
        return network


def without(task: Task) -> dict[str, float]:
    """The strengths of no regularisation at all."""
    return dict.fromkeys(task.strengths("recipe"), 0.0) | {"weight_decay": 0.0}
