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


class StartWeights:
    """What training changes of a model, as it was when this was made: trained parameters and buffers, pre-trained ones too.

    folder: of the run, which then has them in start.pt. None: they are in main memory, a second time.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.model, self.path = model, None if folder is None else folder / START_FILE
        self._other = False  # whether a run was gone on with that started elsewhere
        self._tensors: Mapping[str, Tensor] | None = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in training_tensors(model).items()
        }

    def begin(self, anew: bool) -> None:
        """Note that a run begins; its file then has the weights. Several processes: all must call it.

        anew: False where the run goes on from a checkpoint, and the file is that of its beginning.
        """
        if self.path is not None and self._tensors is not None:
            in_file = distributed.in_first_process(self._write if anew else self.path.is_file)
            self._tensors = None if in_file else self._tensors

    def _write(self) -> bool:
        """Whether the file could be written; a run goes on where it could not."""
        assert self.path is not None
        try:
            save_checkpoint(dict(self._tensors or {}), self.path)
        except OSError:
            return False
        return True

    @torch.no_grad()
    def put(self, fresh: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Put the model where it started.

        fresh: a model of the same class, or a function that makes one, whose weights are used instead.

        Raises ValueError where a weight is trained by now that was frozen then, and the errors of `load_checkpoint`. Several
        processes: all must call it.
        """
        if fresh is not None:
            model = fresh if isinstance(fresh, nn.Module) else fresh()
            self.model.load_state_dict(model.state_dict())
            return
        if self._other:
            raise ValueError("the run goes on from a state, and when this tuner was made the model did not have the weights "
                             "that the run began with: give refit fresh=, a model with them, or with others")  # fmt: skip
        if (start := self._tensors) is None:
            assert self.path is not None
            start = distributed.in_first_process(partial(load_checkpoint, self.path))
        if later := [name for name in training_tensors(self.model) if name not in start]:
            raise ValueError(f"{later[0]!r} is trained by now and was frozen when the run began, so that its start is unknown: "
                             "give refit fresh=, a model with the weights to start from")  # fmt: skip
        own = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        for name, value in start.items():
            own[name].copy_(value)

    def state_dict(self) -> State:
        """Which weights they are, not the weights."""
        return {"checksum": checksum(self._tensors), "other": self._other}

    def load_state_dict(self, state: State) -> None:
        self._other = state["other"] or state["checksum"] != checksum(self._tensors)
