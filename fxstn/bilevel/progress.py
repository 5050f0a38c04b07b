"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm.auto import tqdm

from fxstn.bilevel import distributed
from fxstn.bilevel.history import History


def progress_bar(epochs: int, done: int, shown: bool | None) -> tqdm:
    """The bar, in the first process.

    epochs: in all.
    done: epochs before this call.
    shown: None: on a terminal only.
    """
    hidden = True if distributed.rank() else None if shown is None else not shown
    return tqdm(total=epochs, initial=min(done, epochs), unit="epoch", disable=hidden)


def postfix(history: History, columns: Iterable[str]) -> dict[str, str]:
    """Losses, columns and a few λ of the last row."""
    row = history.rows[-1]
    few = [(name.rpartition(".")[0] or name, row[name]) for name in history.names[:3]]
    losses = [(name, row[f"{name}_loss"]) for name in ("train", "valid") if f"{name}_loss" in row]
    return {name: f"{value:.4g}" for name, value in (*losses, *((name, row[name]) for name in columns), *few)}
