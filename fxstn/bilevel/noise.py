"""Random numbers of the tuner's own steps: they depend on a seed and on the step, and leave the user's generators alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from fxstn.bilevel.distributed import APART, rank
from fxstn.ir.generators import forked_rng, reseed

_STEP = 0x9E3779B97F4A7C15  # the odd number next to 2⁶⁴/φ: seeds of neighbouring steps share no bits


def seed_of_step(seed: int, number: int) -> int:
    """The seed of one step, in [0, 2⁶³); the same in all processes."""
    return (seed + (number + 1) * _STEP) % 2**63


@contextmanager
def own_generators(seed: int, device: torch.device, in_python: bool) -> Iterator[None]:
    """Inside, torch draws from this seed, on the CPU and on the device; each process draws other numbers.

    in_python: whether Python and NumPy do so as well. NumPy takes longer to save its state than a small network for a step.
    """
    own = (seed + APART * (rank() + 1)) % 2**63  # ε has the seed itself
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        )
    states = [generator.get_state() for generator in generators]
    with forked_rng() if in_python else nullcontext():
        if in_python:
            reseed(own)
        for generator in generators:
            generator.manual_seed(own)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
