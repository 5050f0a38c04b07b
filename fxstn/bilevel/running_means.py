"""Mean losses of the epoch under way, which stay on their device until somebody reads them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fxstn.bilevel import distributed
from fxstn.bilevel.counts import Mean, positive, sum_of_means
from fxstn.bilevel.state import State, on_device

Sums = dict[str, Tensor | float]
ADDED = 100  # steps whose losses are added up together: a few kernels for all


class RunningMeans:
    """Mean losses of the epoch under way, and its time. A part with a state in each process.

    device: where sums are loaded to, and averaged over the processes.

    `steps` is the number of inner steps of the epoch; 0 between two epochs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget everything: an epoch begins, or is over."""
        self.steps, self._seconds = 0, 0.0  # seconds of the epoch before a resume
        self._sums: dict[str, Sums] = {}  # {loss: {"total", "count", "unit"}}
        self._added: dict[str, list[Mean]] = {}  # not in the sums yet
        self._start = time.perf_counter()

    def add(self, losses: dict[str, Mean]) -> None:
        """Add the losses of one step, which stay on their device.

        Counts are in units of the first one, so that steps of equal counts have a plain mean.
        """
        for name, loss in losses.items():
            self._added.setdefault(name, []).append(loss)
        self.steps += 1
        if self.steps % ADDED == 0:
            self._sums, self._added = self._whole_sums(), {}

    def _whole_sums(self) -> dict[str, Sums]:
        """The sums with the losses of the last steps.

        Nothing changes. The last bit of a sum depends on which losses are added up together. So this must depend on the steps
        alone, and not on who reads or saves in between.
        """
        result = dict(self._sums)
        for name, losses in self._added.items():
            before = result.get(name) or {"total": 0.0, "count": 0.0, "unit": positive(losses[0].count)}
            total, count = sum_of_means(losses, before["unit"])
            result[name] = {
                "total": before["total"] + total, "count": before["count"] + count, "unit": before["unit"],
            }  # fmt: skip
        return result

    def means(self) -> dict[str, float]:
        """The mean of each loss over what the steps counted, in all processes."""
        whole, alone = self._whole_sums(), distributed.processes() == 1
        units = {name: 1.0 if alone else float(sums["unit"]) for name, sums in whole.items()}
        totals = {name: float(sums["total"]) * units[name] for name, sums in whole.items()}
        counts = {name: float(sums["count"]) * units[name] for name, sums in whole.items()}
        totals, counts = distributed.total(totals, self.device), distributed.total(counts, self.device)
        return {name: total / (counts[name] or 1.0) for name, total in totals.items()}

    def seconds(self) -> float:
        """Seconds of the epoch so far."""
        return self._seconds + time.perf_counter() - self._start

    def state_dict(self) -> State:
        return {
            "steps": self.steps,
            "sums": {name: dict(sums) for name, sums in self._sums.items()},
            "added": {name: [[loss.value, loss.count] for loss in losses] for name, losses in self._added.items()},
            "seconds": self.seconds() if self.steps else 0.0,
        }

    def load_state_dict(self, state: State) -> None:
        self.begin()
        self.steps, self._seconds = state["steps"], state["seconds"]
        self._sums = on_device({name: dict(sums) for name, sums in state["sums"].items()}, self.device)
        added = on_device(state["added"], self.device)
        self._added = {name: [Mean(*loss) for loss in losses] for name, losses in added.items()}

    def refusal(self, state: State) -> str:
        return ""

    def restart(self, state: State) -> None:
        self.begin()
