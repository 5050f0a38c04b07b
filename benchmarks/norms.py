"""How noisy is the loss of a network with batch norms, by the batches that its statistics are estimated on?

    FXSTN_DATA=DIR python -m benchmarks.norms        # a minute on one core

Networks of benchmarks/worth, trained plainly for a task's epochs at a start. Test losses with the running statistics of
training, with the mean statistics of some training batches (torch's own cumulative averages), and with those of an evaluation
of fxstn, which draws them towards the running ones. Mean and standard deviation over ten choices of as many batches as an
evaluation takes at least, then those of all batches.
Results: benchmarks/results/norms.json.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.overhead import RESULTS
from benchmarks.worth.tasks import TASKS
from benchmarks.worth.training import Limits, Plain, scores
from fxstn.bilevel.allowance import Allowance
from fxstn.bilevel.norm_statistics import recalibrated_norms
from fxstn.bilevel.settings import HyperSettings

PATH = RESULTS / "norms.json"
NETWORKS = ("kin8nm", "breast-cancer", "fine-tuned-resnet", "fashion-resnet", "cifar-resnet")
CHOICES = 10


def norms_of(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def averaged(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy with the averages that torch makes of these batches by their sizes, without dropout."""
    network, examples = copy.deepcopy(network).eval(), 0
    for norm in norms_of(network):
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for x in batches:
            examples += len(x)
            for norm in norms_of(network):
                norm.momentum = len(x) / examples
            network(x)
    return network.eval()


def cell(name: str, start: str) -> dict[str, Any]:
    """{kind of statistics: test losses}."""
    task = TASKS[name]
    train, _, test = task.sets(0)
    network = Plain(task, task.strengths(start), 0).run(train, None, Limits(task.epochs)).network.eval()
    generator = torch.Generator().manual_seed(0)
    count = Allowance(HyperSettings().evaluation_share, 0, 0, task.batch).statistics_batches
    losses: dict[str, list[float]] = {"sampled": [], "fxstn": []}
    for _ in range(CHOICES):
        rows = torch.randperm(len(train), generator=generator)[: count * task.batch]
        batches = train.tensors[0][rows].split(task.batch)
        losses["sampled"].append(scores(task, averaged(network, batches), test)[0])
        with recalibrated_norms(norms_of(network), (network(x) for x in batches)):
            losses["fxstn"].append(scores(task, network, test)[0])
    everything = [x for x in train.tensors[0].split(task.batch) if len(x) == task.batch]
    whole = scores(task, averaged(network, everything), test)[0]
    return {"batch": task.batch, "count": count, "running": scores(task, network, test)[0], "all": whole, **losses}


def table(results: dict[str, Any]) -> str:
    rows = []
    for key, one in results.items():
        noisy = [
            f"{statistics.mean(one[kind]):.3f} ± {statistics.pstdev(one[kind]):.3f}" for kind in ("sampled", "fxstn")
        ]
        rows.append(
            [*key.split(), f"{one['count']} × {one['batch']}", f"{one['running']:.3f}", *noisy, f"{one['all']:.3f}"]
        )
    headers = ["task", "start", "batches", "running", "mean of these", "fxstn's of these", "mean of all"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    torch.set_num_threads(1)
    results = {f"{name} {start}": cell(name, start) for name in NETWORKS for start in ("low", "recipe", "high")}
    PATH.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
