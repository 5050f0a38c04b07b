"""How much of a hypergradient is noise? Beside a task's hyperparameters, eight that nothing reads: theirs should be zero.

    python -m benchmarks.controls [--tasks mnist-mlp] [--starts low high]     # a run of the task for each entry

λ is held at its start. Entries: the root mean square, over the hyperparameters and the second half of a run's hyper steps, of
Adam's mean of the hypergradient, in multiples of the same of those that nothing reads: 1 would be noise alone. For three rates
of Adam for Θ (default 1e-2). Results: benchmarks/results/controls.json; one seed.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import fxstn
from benchmarks.overhead import RESULTS
from benchmarks.trials import Task, reading_nothing, trained
from benchmarks.tuning import STARTS, TASKS
from fxstn import hp

PATH = RESULTS / "controls.json"
CONTROLS, MEMORY = 8, 0.9  # as of Adam's mean
RATES = (1e-2, 3e-3, 1e-3)


class Recorder(torch.optim.Optimizer):
    """Keeps the running average of gradients, step by step, in `means`, and moves nothing."""

    def __init__(self, parameters: Any, means: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.means = means

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        ((parameter,),) = (group["params"] for group in self.param_groups)
        gradient = parameter.grad.detach().clone()
        self.means.append(self.means[-1].lerp(gradient, 1 - MEMORY) if self.means else gradient)


def ratio(task: Task, start: str, rate: float, seed: int, root: str | None) -> float:
    """Size of the hypergradients over that of the controls'."""
    means: list[Tensor] = []
    controls = [hp.Scalar(f"control {i}", init=0.5, low=0.0, high=1.0) for i in range(CONTROLS)]
    settings = {
        "hyper": fxstn.HyperSettings(optimizer=partial(Recorder, means=means)),
        "response": fxstn.ResponseSettings(optimizer=partial(torch.optim.Adam, lr=rate)),
    }
    watched = replace(
        task, specs=lambda at: [*task.specs(at), *controls], loss=reading_nothing(task.loss),
        settings=task.settings | settings,
    )  # fmt: skip
    trained(watched, "default", STARTS[start], seed, root)
    late = torch.stack(means[len(means) // 2 :])
    real, null = (part.square().mean().sqrt().item() for part in (late[:, :-CONTROLS], late[:, -CONTROLS:]))
    return real / null


def table(found: dict[str, float]) -> str:
    rows: dict[str, dict[float, float]] = {}
    for key, value in found.items():
        task, start, rate = key.split()
        rows.setdefault(f"{task}, {start} start", {})[float(rate)] = value
    cells = [[name, *(f"{row[rate]:.1f}" if rate in row else "" for rate in RATES)] for name, row in rows.items()]
    heads = ["size / size of noise", *(f"Θ by Adam {rate:g}" for rate in RATES)]
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["concrete-mlp", "mnist-mlp", "digits-resnet18"], choices=list(TASKS),
                        help="which tasks")  # fmt: skip
    parser.add_argument("--starts", nargs="+", default=["low", "high"], choices=list(STARTS), help="where λ is held")
    parser.add_argument("--data-root", default=os.environ.get("FXSTN_DATA"),
                        help="where torchvision's data and uci/NAME.npz lie (default: the variable FXSTN_DATA)")  # fmt: skip
    args = parser.parse_args()
    for name in args.tasks:
        for start in args.starts:
            for rate in RATES:
                found = json.loads(PATH.read_text()) if PATH.exists() else {}
                if (key := f"{name} {start} {rate:g}") not in found:
                    found[key] = ratio(TASKS[name], start, rate, 0, args.data_root)
                    PATH.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(table(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
