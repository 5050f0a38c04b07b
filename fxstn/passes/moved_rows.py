"""Which axis of a value moves entry by entry with one axis of another: move some rows of one, look at the other."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_RUNS = 64
Runs = tuple[tuple[int, int], ...]


def steps_of(value: Tensor) -> Tensor:
    """By how much each entry of a value is moved."""
    return torch.empty_like(value).uniform_(0.5, 1.5) * (value.abs().mean() + 0.1)


def with_rows_moved(axis: int | None, bit: int, on: int, value: Tensor, steps: Tensor) -> Tensor:
    """A value with the rows moved whose number has one bit set (`on` 1) or clear (0); axis None: all of it is row 0.

    steps: by how much each entry moves.
    """
    if axis is None:
        return value if on else value + steps
    numbers = torch.arange(value.shape[axis], device=value.device)
    chosen = ((numbers >> bit) & 1) == on
    return value + steps * chosen.view([-1 if i == axis else 1 for i in range(value.dim())])


def decode(moves: list[tuple[Tensor, Tensor]], rows: int, preferred: int) -> tuple[int, list[int]] | None:
    """(axis, row of each position along it) where each moves with one row only; None where there is no such axis.

    A position that depends on no row goes on where the last one was.
    """
    rank = moves[0][0].dim()
    for axis in sorted(range(rank), key=lambda candidate: candidate != preferred):
        sets, clears = (  # each (bits, positions)
            torch.stack([move[i].movedim(axis, 0).reshape(move[i].shape[axis], -1).any(1) for move in moves])
            for i in (0, 1)
        )
        if (sets & clears).any():
            continue
        depends = (sets | clears).any(0).tolist()
        numbers = (sets.long() << torch.arange(len(moves), device=sets.device)[:, None]).sum(0).tolist()
        result: list[int] = []
        for number, known in zip(numbers, depends, strict=True):
            result.append(number if known else (result[-1] + 1) % rows if result else 0)
        if all(number < rows for number in result):
            return axis, result
    return None


def joined(rows: list[int]) -> Runs | None:
    """Consecutive rows as runs; None for too many."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple(runs) if len(runs) <= MOST_RUNS else None
