"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm.auto import tqdm

from fxstn.bilevel import distributed
from fxstn.bilevel.history import History

FORMAT = "{l_bar}{bar}| {n:.2f}/{total} epochs [{elapsed}<{remaining}{postfix}]"


class EpochBar(tqdm):
    """A bar of epochs, which moves within an epoch, too."""

    def move_to(self, epochs: float) -> None:
        """Show that so many epochs are done. It may go back."""
        self.update(epochs - self.n)

    def end_epoch(self, history: History, columns: Iterable[str]) -> None:
        """Show losses, columns and a few λ of the last row."""
        row = history.rows[-1]
        few = [(name, row[name]) for name in history.names[:3]]
        losses = [(name, row[f"{name}_loss"]) for name in ("train", "valid") if f"{name}_loss" in row]
        numbers = (*losses, *((name, row[name]) for name in columns), *few)
        self.set_postfix({name: f"{value:.4g}" for name, value in numbers}, refresh=False)
        self.move_to(len(history))


def progress_bar(epochs: int, done: int, shown: bool | None, what: str | None = None) -> EpochBar:
    """The bar, in the first process.

    epochs: in all.
    done: epochs before this call.
    shown: None: on a terminal only.
    what: stands before the bar.
    """
    hidden = True if distributed.rank() else None if shown is None else not shown
    return EpochBar(total=epochs, initial=min(done, epochs), desc=what, bar_format=FORMAT, disable=hidden)
