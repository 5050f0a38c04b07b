"""The weights that a network starts its run with: a refit trains it from there once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fxstn.bilevel import distributed
from fxstn.bilevel.checkpoint import load_checkpoint, save_checkpoint
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

    def save(self, anew: bool = False) -> None:
        """Move the weights from main memory to the file; another call tries again where it failed.

        Several processes: all must call it.
        anew: whether the run begins now: a file that is there is of another run.
        """
        if self.path is not None and self._tensors is not None:
            in_file = distributed.in_first_process(partial(self._is_in_file, self.path, anew))
            self._tensors = None if in_file else self._tensors

    def _is_in_file(self, path: Path, anew: bool) -> bool:
        if not anew and path.is_file():
            return True
        if self._own != self._first:
            return False
        try:
            save_checkpoint(dict(self._tensors or {}), path)
        except OSError:  # a run goes on where it could not be written
            return False
        return True

    @torch.no_grad()
    def put(self, fresh: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Put the model where it started.

        fresh: a model of the same class, or a function that makes one, whose weights are used instead.

        Raises ValueError where the first weights are not known, or a weight is trained by now that was frozen then. Several
        processes: all must call it.
        """
        if fresh is not None:
            model = fresh if isinstance(fresh, nn.Module) else fresh()
            self.model.load_state_dict(model.state_dict())
            return
        start = self._tensors
        if start is None:
            assert self.path is not None
            start = distributed.in_first_process(partial(_read, self.path))
        if checksum(start) != self._first:
            missing = f"{self.path} is missing, and " if self.path else ""
            why = f"{self.path} has others" if self._tensors is None else f"{missing}this model was made with others"
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


def _read(path: Path) -> State:
    """Raises ValueError where the file cannot be read."""
    try:
        return load_checkpoint(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the weights that the run began with are not known: {reason}{_REMEDY}") from error
