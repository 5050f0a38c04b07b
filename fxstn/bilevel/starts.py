"""The weights that a network starts its run with: a refit trains it from there once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fxstn.bilevel import distributed
from fxstn.bilevel.checkpoint import load_checkpoint, save_checkpoint
from fxstn.bilevel.complete_state import CompleteState, load_complete
from fxstn.bilevel.sources import checksum
from fxstn.bilevel.state import State
from fxstn.bilevel.temporary import training_tensors

START_FILE = "start.pt"
_REMEDY = "; give refit fresh=, a model with the weights to start from"


class StartWeights:
    """What training changes of a model, as it was when this was made: trained parameters and buffers, pre-trained ones too.

    folder: of the run, which then has them in start.pt. None: they are in main memory, a second time.

    Its state is a checksum of the weights that the run began with. Where a run goes on from a state, the model may have been
    made with others: those in the file are right then, or none are.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.model, self.path = model, None if folder is None else folder / START_FILE
        self._tensors: Mapping[str, Tensor] | None = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in training_tensors(model).items()
        }
        self._own = self._first = checksum(self._tensors)  # of the tensors here, and of those that the run began with

    @property
    def _known(self) -> Mapping[str, Tensor] | None:
        """The weights that the run began with, where they are in main memory."""
        return self._tensors if self._own == self._first else None

    def save(self) -> None:
        """Move the weights from main memory to the file; another call tries again where it failed.

        Several processes: all must call it.
        """
        if self.path is not None and (weights := self._known) is not None:
            written = distributed.in_first_process(partial(_write, dict(weights), self.path))
            self._tensors = None if written else self._tensors

    @torch.no_grad()
    def put(self, fresh: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Put the model where it started.

        fresh: a model of the same class, or a function that makes one, whose weights are used instead.

        Raises ValueError where the first weights are not known, or a weight is trained by now that was frozen then. Several
        processes: all must call it.
        """
        if fresh is not None:
            model = fresh if isinstance(fresh, nn.Module) else fresh()
            load_complete(self.model, CompleteState(model).state_dict())
            return
        start = self._known
        if start is None and self.path is not None:
            start = distributed.in_first_process(partial(_read, self.path))
        if start is None or checksum(start) != self._first:
            why = f"{self.path} has others" if self.path else "this model was made with others"
            raise ValueError(f"the weights that the run began with are not known: {why}{_REMEDY}")
        if later := [name for name in training_tensors(self.model) if name not in start]:
            raise ValueError(f"{later[0]!r} is trained by now and was frozen when the run began{_REMEDY}")
        own = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        for name, value in start.items():
            own[name].copy_(value)

    def state_dict(self) -> State:
        """Which weights they are, not the weights."""
        return {"checksum": self._first}

    def load_state_dict(self, state: State) -> None:
        """Go on with a run that began with the weights of this state."""
        self._first = state["checksum"]


def _write(weights: State, path: Path) -> bool:
    """Whether a file could be written; a run goes on where it could not."""
    try:
        save_checkpoint(weights, path)
    except OSError:
        return False
    return True


def _read(path: Path) -> State:
    """Raises ValueError where the file cannot be read."""
    try:
        return load_checkpoint(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the weights that the run began with are not known: {reason}{_REMEDY}") from error
