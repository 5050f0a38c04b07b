"""The global random generators of torch, Python and NumPy, which a forward may draw from: all of them are saved and seeded."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalRandomState:
    """States of the global generators of Python, torch, CUDA and NumPy, those of the last two where they are in use."""

    python: tuple[Any, ...]
    torch: Tensor
    cuda: list[Tensor]
    numpy: Any

    @classmethod
    def current(cls) -> GlobalRandomState:
        numpy = sys.modules.get("numpy")
        return cls(
            random.getstate(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            None if numpy is None else numpy.random.get_state(),
        )

    @classmethod
    def seeded(cls, seed: int) -> GlobalRandomState:
        """The states of generators with this seed; seed in [0, 2³²)."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        numpy = sys.modules.get("numpy")
        return cls(
            random.Random(seed).getstate(),
            torch.Generator().manual_seed(seed).get_state(),
            [torch.Generator(f"cuda:{device}").manual_seed(seed).get_state() for device in devices],
            None if numpy is None else numpy.random.RandomState(seed).get_state(),
        )

    def set(self) -> None:
        """Set the global generators. A run may go on with fewer GPUs than it began on."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        devices = torch.cuda.device_count() if self.cuda and torch.cuda.is_available() else 0
        for device, state in enumerate(self.cuda[:devices]):
            torch.cuda.set_rng_state(state, device)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)

    def still_holds(self) -> bool:
        """Whether nothing has been drawn since; a device that has come into use meanwhile is left aside."""
        now = GlobalRandomState.current()
        of_torch = zip([self.torch, *self.cuda], [now.torch, *now.cuda], strict=False)
        of_numpy = self.numpy is None or pickle.dumps(self.numpy) == pickle.dumps(now.numpy)
        return self.python == now.python and of_numpy and all(torch.equal(*pair) for pair in of_torch)

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint holds them."""
        version, internal, gauss = self.python
        state: dict[str, Any] = {
            "python": (version, torch.tensor(internal), gauss),
            "torch": self.torch,
            "cuda": self.cuda,
        }
        if self.numpy is None:
            return state | {"numpy": None}
        kind, keys, *rest = self.numpy
        return state | {"numpy": (kind, torch.tensor(keys.astype("int64")), *rest)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> GlobalRandomState:
        version, internal, gauss = state["python"]
        numpy = state["numpy"]
        if numpy is not None:
            numpy = (numpy[0], numpy[1].cpu().numpy().astype("uint32"), *numpy[2:])
        return cls(
            (version, tuple(internal.cpu().tolist()), gauss),
            state["torch"].cpu(),
            [generator.cpu() for generator in state["cuda"]],
            numpy,
        )


@contextmanager
def forked_rng() -> Iterator[None]:
    """Random generators are as they were afterwards: those of Python and NumPy, and torch's on every device in use."""
    before = GlobalRandomState.current()
    try:
        yield
    finally:
        before.set()


@contextmanager
def forked_torch_rng() -> Iterator[None]:
    """As `forked_rng`, for torch's generators alone: what looks for draws in Python around it still sees them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def reseed(seed: int = 0) -> None:
    """Makes the next random draws of torch, Python and NumPy those after the last call with this seed.

    Of torch it does what torch.manual_seed does, without the bookkeeping for devices that nothing has used yet.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
