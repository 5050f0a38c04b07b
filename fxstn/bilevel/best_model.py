"""The model of a run that is kept: that of its best epoch."""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fxstn.bilevel.complete_state import left_out, load_complete
from fxstn.bilevel.problem import BilevelProblem
from fxstn.bilevel.state import State, on_device


class Best(TypedDict):
    """An epoch, its validation loss, and the state_dict of the model that it would export."""

    epoch: int
    valid_loss: float
    model: dict[str, Any]


class BestModel:
    """The model of the epoch with the lowest validation loss. `record` is None before the first epoch.

    others: what the state_dict of the model leaves out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record: Best | None = None
        self.others: dict[str, Tensor] = {}

    def offer(self, epoch: int, valid_loss: float, problem: BilevelProblem) -> bool:
        """Keep the model of a problem where it is better; returns whether it is."""
        if self.record is not None and not valid_loss < self.record["valid_loss"]:
            return False
        self.keep(epoch, valid_loss, problem)
        return True

    def keep(self, epoch: int, valid_loss: float, problem: BilevelProblem) -> None:
        """Keep the model of a problem.

        valid_loss: NaN where there are no validation data.
        """
        exported = problem.export()
        model = {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # extra state of a module
            for name, value in exported.state_dict().items()
        }
        self.record = {"epoch": epoch, "valid_loss": valid_loss, "model": model}
        self.others = {name: value.clone() for name, value in left_out(exported, model).items()}

    def put(self, model: nn.Module) -> None:
        """Give a model of the same class the weights of `record`."""
        assert self.record is not None
        load_complete(model, self.record["model"] | self.others)

    def state_dict(self) -> State:
        return {"record": self.record, "others": self.others}

    def load_state_dict(self, state: State) -> None:
        self.record = on_device(state["record"], self.device)
        self.others = on_device(state["others"], self.device)
