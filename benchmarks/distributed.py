"""What several processes cost: each kind of step with 1 and with 2 gloo processes on one machine, and what they send.

    python -m benchmarks.distributed [--processes 2] [--batch-size 16] [--rounds 5]

Each process has the batch to itself and one thread, so that with a core for each the ratio to one process is the cost of the
communication (and of what cores share). Medians over rounds of 5 steps; numbers sent are counted where they are sent.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torchvision import models

import fxstn
from fxstn import hp

STEPS = 5


def measured(rank: int, world: int, folder: str, batch: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    stn = fxstn.transform(models.resnet18(num_classes=10), [hp.Dropout("layer1", "layer2"), hp.WeightDecay()])
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    kinds = {
        "inner": (fxstn.general_loss, list(stn.general_parameters())),
        "response": (fxstn.response_loss, list(stn.response_parameters())),
        "hyper": (fxstn.hyper_loss, [stn.hparams.unconstrained]),
    }
    sent, all_reduce = [0], dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for name, (loss, parameters) in kinds.items():
        times = []
        for _ in range(rounds + 1):  # the first is left out: graphs are made there
            sent[0], start = 0, time.perf_counter()
            for _ in range(STEPS):
                stn.zero_grad()
                loss(stn, F.cross_entropy, x, y).backward()
                fxstn.average_gradients(parameters)
            times.append((time.perf_counter() - start) / STEPS)
        if rank == 0:
            results.put((world, name, statistics.median(times[1:]), sent[0] // STEPS))
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    results, found = context.SimpleQueue(), {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, args.processes):
            given = (world, folder, args.batch_size, args.rounds, results)
            torch.multiprocessing.spawn(measured, given, nprocs=world)
            for _ in range(3):
                number, name, seconds, size = results.get()
                found[number, name] = seconds, size
    rows = []
    for name in ("inner", "response", "hyper"):
        (alone, _), (together, size) = found[1, name], found[args.processes, name]
        rows.append([name, 1e3 * alone, 1e3 * together, together / alone, size / 1e6])
    print(
        tabulate(
            rows, ["step", "1 process, ms", f"{args.processes} processes, ms", "ratio", "sent, MB"], floatfmt=".3g"
        )
    )


if __name__ == "__main__":
    main()
