"""Plain training of a task's network, as a practitioner writes it: no part of fxstn but its augmentations takes part.

The strengths act on ordinary modules and on the optimizer's groups, so that a search may change them between epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.worth.tasks import Task

CHUNK = 500  # examples of an evaluation at a time


def joined(*sets: TensorDataset) -> TensorDataset:
    """The examples of all."""
    return TensorDataset(*(torch.cat(parts) for parts in zip(*(one.tensors for one in sets), strict=True)))


def batches(data: TensorDataset, size: int, generator: torch.Generator) -> list[Tensor]:
    """Places of examples, in a drawn order; a rest of one is left out, as batch norms cannot use it."""
    parts = torch.randperm(len(data), generator=generator).split(size)
    return [part for part in parts if len(part) > 1]


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


@dataclass
class Plain:
    """A network in training: its weights, optimizer, strengths, time and the best epoch so far.

    augment: what happens to the images of a batch, before the strengths act; None: nothing.
    optimizer_of: factory of the optimizer of the network; None: the task's, with weight decay where it belongs.
    """

    task: Task
    strengths: Mapping[str, float]
    seed: int
    augment: Callable[[Tensor], Tensor] | None = None
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    seconds: float = 0.0
    epochs: int = 0
    curve: list[float] = field(default_factory=list)
    best: float = float("inf")
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.network = self.task.network()
        self.order = torch.Generator().manual_seed(self.seed)
        if self.optimizer_of is None:
            weights, others = decayed(self.network)
            self.optimizer = self.task.optimizer([{"params": weights}, {"params": others}])
        else:
            self.optimizer = self.optimizer_of(self.network)
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
            x = operation.function(x, *values, **operation.defaults) if any(values) else x
        return x

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the optimizer. Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.network(self._augmented(x)), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, train: TensorDataset, valid: TensorDataset | None) -> float:
        """One pass, and the loss of the validation set (NaN without one). The best weights so far are kept."""
        begun = time.process_time()
        self.network.train()
        x, y = train.tensors
        for part in batches(train, self.task.batch, self.order):
            self.step(x[part], y[part])
        self.epochs += 1
        loss = float("nan")
        if valid is not None:
            loss = scores(self.task, self.network, valid)[0]
            if loss < self.best:
                self.best, self.best_epoch = loss, self.epochs
                self.best_weights = deepcopy(self.network.state_dict())
        self.curve.append(loss)
        self.seconds += time.process_time() - begun
        return loss

    def best_network(self) -> nn.Module:
        """At the best epoch; as it is, where no validation set was seen."""
        if self.best_weights:
            self.network.load_state_dict(self.best_weights)
        return self.network


def without(task: Task) -> dict[str, float]:
    """The strengths of no regularisation at all."""
    return dict.fromkeys(task.strengths("recipe"), 0.0) | {"weight_decay": 0.0}
